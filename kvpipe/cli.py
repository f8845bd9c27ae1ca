"""The command line: a verb, then Hydra overrides. The composition root; no phase names here.

Exit codes: 0 passed, 1 a check failed, 2 wrong input (nothing was started), 3 the engine failed,
4 W&B failed, 128 + n ended by signal n.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kvpipe.credentials import API_KEY, wandb_api_key
from kvpipe.errors import InputError, KvpipeError
from kvpipe.jax_environment import jax_environment
from kvpipe.model_dir import check_model
from kvpipe.phase import Phase
from kvpipe.plan import check_order
from kvpipe.prompt import read_prompt
from kvpipe.records import RECORDS_FILE
from kvpipe.schema import Kvpipe, OutputFormat, from_plain, to_plain
from kvpipe.sinks import Sink, Sinks
from kvpipe.sinks.jsonl import JsonLines
from kvpipe.sinks.wandb import WandbSink
from kvpipe.steps import build_steps
from kvpipe.suggest import nearest

_QUIET = ["hydra.run.dir=.", "hydra.output_subdir=null"]


class JobFailed(KvpipeError):
    """A job of a sweep failed; Hydra goes on with the others."""


def main(argv: Sequence[str]) -> int:
    """Run the verb of a command line and return the exit code.

    Args:
        argv: the program's name, then the verb if there is one, then Hydra's arguments.
    """
    verb, arguments = _split_verb(argv[1:])
    ConfigStore.instance().store(name="kvpipe_schema", node=Kvpipe)
    # Hydra would print its own message and exit 1; its errors are told here, like all others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        action, extra = VERBS[verb]
        return _with_hydra(action, argv[0], [*arguments, *extra])
    except (HydraException, OmegaConfBaseException) as error:
        return _tell(InputError(_one_message(error)))
    except KvpipeError as error:
        return _tell(error)


def run(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Carry the run out; everything that can be wrong with the input is refused before it."""
    from kvpipe import supervisor

    steps = _checked_steps(config)
    jax_environment(config.engine, os.environ)
    runtime = HydraConfig.get().runtime
    run_dir = Path(runtime.output_dir)
    tracker = WandbSink(config.tracking, run_dir, wandb_api_key(Path(runtime.cwd), os.environ))
    with (run_dir / RECORDS_FILE).open("w", encoding="utf-8") as records:
        # W&B first: what it cannot take at the end has to stand in the other sinks' last record.
        sinks = Sinks([tracker, JsonLines(records), _screen(config.output)])
        start_tracking = partial(tracker.start, plain)
        work = supervisor.Run(config, plain, steps, run_dir, sinks, start_tracking, (API_KEY,))
        finished = work.carry_out()
    if finished.exit_code and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise JobFailed(finished.error or finished.status)
    return finished.exit_code


def _screen(output: OutputFormat) -> Sink:
    """Return what shows the run on stdout: a table for people, JSON lines for pipes."""
    if output is OutputFormat.auto:
        output = OutputFormat.table if sys.stdout.isatty() else OutputFormat.json
    if output is OutputFormat.json:
        return JsonLines(sys.stdout)
    from kvpipe.sinks.console import Console

    return Console()


def _checked_steps(config: Kvpipe) -> tuple[Phase, ...]:
    """Return the steps after every check of the input that needs no jax."""
    steps = build_steps(config)
    check_order(steps)
    check_model(config)
    read_prompt(config.prompt)
    return steps


def check(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Fold what the steps declare and say that their order holds."""
    steps = _checked_steps(config)
    print(f"{config.experiment}: {len(steps)} steps, their order holds")
    return 0


Action = Callable[[Kvpipe, dict[str, Any]], int]
VERBS: dict[str, tuple[Action, list[str]]] = {"run": (run, []), "check": (check, _QUIET)}


def _split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb and the rest; a bare first word is a verb, none means run."""
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        return "run", list(arguments)
    verb, *rest = arguments
    if verb.startswith(("+", "~")):
        return "run", list(arguments)
    if verb not in VERBS:
        sys.exit(_tell(InputError(f"there is no verb {verb!r}; {nearest(verb, VERBS)}")))
    return verb, rest


def _with_hydra(action: Action, program: str, arguments: list[str]) -> int:
    """Let Hydra compose the config and call ``action``; return the exit code of the last job."""
    codes = [0]

    def job(composed: DictConfig) -> None:
        plain = to_plain(composed)
        codes.append(action(from_plain(plain), plain))

    sys.argv = [program, *arguments]
    hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")(job)()
    return codes[-1]


def _tell(error: KvpipeError) -> int:
    print(f"kvpipe: {error}", file=sys.stderr)
    return error.exit_code


def _one_message(error: Exception) -> str:
    """Return Hydra's or OmegaConf's message on as few lines as it has, without blank ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines.append(str(cause).splitlines()[0])
    return "\n  ".join(lines)
