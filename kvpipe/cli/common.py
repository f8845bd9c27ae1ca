"""Shared by several verbs: the checks of the input, the output file, errors on stderr."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig

from kvpipe.config.hosts import check_hosts
from kvpipe.config.hydra_errors import one_message
from kvpipe.config.jax_environment import check_mesh
from kvpipe.config.prompt import read_prompt
from kvpipe.config.prompts import read_prompts
from kvpipe.config.schema import Kvpipe, OutputFormat, TrackingMode
from kvpipe.errors import InputError
from kvpipe.parent import resumption
from kvpipe.parent.planner_client import Planners
from kvpipe.parent.run_directory import RUN_DIR
from kvpipe.plan.continuation import planned_steps
from kvpipe.plan.fold import PlannedStep
from kvpipe.plan.inputs import check_inputs
from kvpipe.sinks.own import origins
from kvpipe.system.secrets import known_secrets, redactor, refuse_secret

PLANNERS = Planners()
"""The planning child processes of this process, kept from one job of a sweep to the next."""


def completed_elsewhere(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a verb that does not run it, completed from the checkpoint of its run.

    Raises:
        InputError: as of :func:`kvpipe.parent.resumption.completed`, or no run is named.
    """
    if not plain["resume"]:
        return plain
    given = [text for text in HydraConfig.get().overrides.hydra if text.startswith(f"{RUN_DIR}=")]
    # The last one keeps Hydra's files out of the way.
    named = [text.partition("=")[2].strip("'\"") for text in given[:-1]]
    if not named:
        raise InputError(f"resume: name the directory of the run with {RUN_DIR}")
    return resumption.completed(plain, Path(named[-1]))


def checked_steps(config: Kvpipe, whole: bool = True) -> tuple[PlannedStep, ...]:
    """Return the steps with their effects after every input check that needs no jax.

    With ``whole`` the model's directory must have all that a run needs.

    Raises:
        InputError: a check failed.
    """
    planned = ordered_steps(config)
    check_inputs(config, planned, whole=whole)
    return planned


def ordered_steps(config: Kvpipe) -> tuple[PlannedStep, ...]:
    """Return the steps with their effects, after the checks that need no file of the model.

    Raises:
        InputError: a check failed.
    """
    planned = planned_steps(config)
    origins(config.sinks)
    check_mesh(config.engine)
    check_hosts(config)
    online = config.tracking.mode is TrackingMode.online
    secrets = known_secrets(Path.cwd(), os.environ, online)
    refuse_secret("prompt.file", read_prompt(config.prompt), secrets)
    if any(item.effect.rolls_out for item in planned):
        for prompt in read_prompts(config.prompts):
            refuse_secret("prompts.file", json.dumps(asdict(prompt), ensure_ascii=False), secrets)
    return planned


@contextmanager
def open_output(key: str, file: str | None) -> Iterator[TextIO]:
    """Yield a stream to ``file``, the value of ``key``; without a file, stdout.

    Raises:
        InputError: the file cannot be written.
    """
    if file is None:
        yield sys.stdout
        return
    try:
        with Path(file).open("w", encoding="utf-8") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"{key}: cannot write {file}: {error.strerror}") from None


def shown_format(output: OutputFormat) -> OutputFormat:
    """Return the format of stdout, with ``auto`` resolved."""
    if output is not OutputFormat.auto:
        return output
    return OutputFormat.table if sys.stdout.isatty() else OutputFormat.json


def input_error(error: Exception) -> InputError:
    """Convert an error of a wrong config to the error to report."""
    return error if isinstance(error, InputError) else InputError(one_message(error))


def notify(text: str) -> None:
    """Write to stderr, with the environment's secrets redacted."""
    print(redactor(os.environ, None).text(text), end="", file=sys.stderr)
