"""Cache the results of ahead-of-time compilation, so that a plan compiles only once."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import aot
from kvpipe.errors import InputError
from kvpipe.records.run import Program
from kvpipe.system.versions import version_of

_PACKAGES = ("sglang-jax", "jax", "jaxlib", "libtpu", "flax", "optax")


def compiled(
    config: EngineConfig, model_dir: Path, topology: str, prompt_tokens: int, cache_dir: Path
) -> tuple[Program, ...]:
    """Return the engine's steps compiled for a TPU topology, from the cache if present.

    The arguments are those of :func:`kvpipe.engine.aot.compile_steps`, and the cache's directory.

    Raises:
        CompileFinding: a step does not compile for the target; a failure is not cached.
    """
    content = {"engine": asdict(config), "topology": topology, "prompt_tokens": prompt_tokens}
    return cached(
        content,
        model_dir,
        cache_dir,
        lambda: aot.compile_steps(config, model_dir, topology, prompt_tokens),
    )


def cached(
    content: Mapping[str, Any],
    model_dir: Path,
    cache_dir: Path,
    make: Callable[[], tuple[Program, ...]],
) -> tuple[Program, ...]:
    """Return what ``make`` compiles, from the cache if present; an exception from it is not cached.

    ``content`` is the cache key, apart from the model's config and the package versions.
    """
    model = json.loads((model_dir / "config.json").read_text("utf-8"))
    content = {**content, "model": model, "versions": _versions()}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = cache_dir / "programs" / f"{key}.json"
    if path.is_file():
        return tuple(Program(**program) for program in json.loads(path.read_text()))
    programs = make()
    _write(path, programs)
    return programs


def _write(path: Path, programs: Sequence[Program]) -> None:
    """Write the file atomically: another process may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(program) for program in programs]))
    part.replace(path)


def _versions() -> dict[str, str]:
    """Return the versions of the packages that determine the compiled result."""
    try:
        return {name: version_of(name) for name in _PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"plan.compile: {error.name} is not installed; it compiles for a TPU, and has wheels "
            "for Linux on x86-64"
        ) from None
