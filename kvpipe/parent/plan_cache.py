"""Keep plans on disk: an unchanged config needs neither jax nor the engine, whose import takes seconds."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.model_dir import cache_dir
from kvpipe.config.prompt import tokens_of_prompt
from kvpipe.config.schema import Kvpipe
from kvpipe.engine.program_cache import PROGRAMS, file_for, write
from kvpipe.plan.targets import Target
from kvpipe.records.run import RunPlanned
from kvpipe.system import places

# They say where a plan or a run is shown, not what is in it.
_SHOWN_BY = ("label", "output", "tracking")
_PLAN_SHOWN_BY = ("file", "format", "timeout_s")


def kept(
    config: Kvpipe,
    plain: Mapping[str, Any],
    target: Target,
    model_dir: Path,
    make: Callable[[], RunPlanned],
) -> RunPlanned:
    """Return the plan that an earlier call has made of the same input, or else make and keep it.

    The input is the config, the target, the model's ``config.json``, the length of the prompt, the
    versions of the packages, kvpipe's own source, and the names of the programs that are compiled:
    a plan takes those. A file that cannot be read or written is not an error, since the plan can be
    made again.
    """

    def file() -> Path:
        return file_for(_input(config, plain, target, model_dir), cache_dir(config), "plans")

    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return RunPlanned.from_json(json.loads(file().read_text("utf-8")))
    plan = make()
    with suppress(OSError):
        write(file(), plan.to_json())  # under another name, if it has compiled programs
    return plan


def _input(
    config: Kvpipe, plain: Mapping[str, Any], target: Target, model_dir: Path
) -> dict[str, Any]:
    read = {key: value for key, value in plain.items() if key not in _SHOWN_BY}
    read["plan"] = {k: v for k, v in plain["plan"].items() if k not in _PLAN_SHOWN_BY}
    return {
        "config": read,
        "target": asdict(target),
        "model": (model_dir / "config.json").read_text("utf-8"),
        "prompt_tokens": tokens_of_prompt(config),
        "programs": sorted(path.name for path in (cache_dir(config) / PROGRAMS).glob("*.json")),
        "source": _source(),
    }


@cache
def _source() -> str:
    """Return a digest of the code that plans: a change of it need not change a version."""
    digest = hashlib.sha256()
    for file in sorted((*places.PACKAGE.rglob("*.py"), *places.PHASES.glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()
