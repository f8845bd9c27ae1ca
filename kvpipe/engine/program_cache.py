"""Compiled steps by what they were compiled from: a plan in review should not compile twice."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpipe.engine import aot
from kvpipe.errors import InputError
from kvpipe.records import Program
from kvpipe.schema import EngineConfig
from kvpipe.versions import version_of

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
    packages: Sequence[str] = (),
) -> tuple[Program, ...]:
    """Return what ``make`` compiles, from the cache if it is in it.

    Args:
        content: what it is compiled from, beside the model and the versions of what compiles.
        model_dir: directory with the model's config.json.
        cache_dir: kvpipe's cache.
        make: compiles; what it raises is not kept.
        packages: packages, beside the engine's, whose versions matter.
    """
    model = json.loads((model_dir / "config.json").read_text())
    content = {**content, "model": model, "versions": _versions((*_PACKAGES, *packages))}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = cache_dir / "programs" / f"{key}.json"
    if path.is_file():
        return tuple(Program(**program) for program in json.loads(path.read_text()))
    programs = make()
    _write(path, programs)
    return programs


def _write(path: Path, programs: Sequence[Program]) -> None:
    """Write the file whole or not at all: another process may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(program) for program in programs]))
    part.replace(path)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of what compiles.

    Raises:
        InputError: libtpu is not installed; it has wheels for Linux on x86-64 alone.
    """
    try:
        return {name: version_of(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"plan.compile: {error.name} is not installed; it compiles for a TPU, and has wheels "
            "for Linux on x86-64"
        ) from None
