"""Compiled steps by what they were compiled from: a plan in review should not compile twice."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvpipe.engine import aot
from kvpipe.errors import InputError
from kvpipe.records import Program
from kvpipe.schema import EngineConfig

_PACKAGES = ("sglang-jax", "jax", "jaxlib", "libtpu", "flax")


def compiled(
    config: EngineConfig, model_dir: Path, topology: str, prompt_tokens: int, cache_dir: Path
) -> tuple[Program, ...]:
    """Return the engine's steps compiled for a TPU topology, from the cache if they are in it.

    Args:
        config: how the engine will be started.
        model_dir: directory with the model's config.json.
        topology: chip and shape, e.g. ``v4:2x2x1``.
        prompt_tokens: length of the prompt.
        cache_dir: kvpipe's cache; the steps are kept in ``programs`` below it.

    Raises:
        CompileFinding: a step does not compile for the target; that is not kept.
    """
    content = {
        "engine": asdict(config),
        "model": json.loads((model_dir / "config.json").read_text()),
        "topology": topology,
        "prompt_tokens": prompt_tokens,
        "versions": _versions(),
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = cache_dir / "programs" / f"{key}.json"
    if path.is_file():
        return tuple(Program(**program) for program in json.loads(path.read_text()))
    programs = aot.compile_steps(config, model_dir, topology, prompt_tokens)
    _write(path, programs)
    return programs


def _write(path: Path, programs: Sequence[Program]) -> None:
    """Write the file whole or not at all: another process may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(program) for program in programs]))
    part.replace(path)


def _versions() -> dict[str, str]:
    """Return the versions of what compiles.

    Raises:
        InputError: libtpu is not installed; it has wheels for Linux on x86-64 alone.
    """
    try:
        return {name: importlib.metadata.version(name) for name in _PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"plan.compile: {error.name} is not installed; it compiles for a TPU, and has wheels "
            "for Linux on x86-64"
        ) from None
