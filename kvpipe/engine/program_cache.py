"""Cache the results of ahead-of-time compilation, so that a plan compiles only once.

The results are files in the ``programs`` directory of kvpipe's cache.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from kvpipe.records.run import Program
from kvpipe.system.versions import version_of

# Goes up when kvpipe's own programs change, or what is kept of a program.
_FORMAT = 4
PROGRAMS = "programs"
_PACKAGES = ("sglang-jax", "jax", "jaxlib", "libtpu", "flax", "optax")


def cached(
    content: Mapping[str, Any],
    model_dir: Path,
    cache_dir: Path,
    make: Callable[[], tuple[Program, ...]] | None,
) -> tuple[Program, ...] | None:
    """Return compiled programs from the cache, or what ``make`` compiles; None without either.

    An exception from ``make`` is not cached. ``content`` is the cache key, apart from the model's
    config and the package versions.
    """
    model = json.loads((model_dir / "config.json").read_text("utf-8"))
    path = file_for({**content, "model": model}, cache_dir)
    if path.is_file():
        return tuple(Program(**program) for program in json.loads(path.read_text()))
    if make is None:
        return None
    programs = make()
    write(path, [asdict(program) for program in programs])
    return programs


def file_for(content: Mapping[str, Any], cache_dir: Path, folder: str = PROGRAMS) -> Path:
    """Return the cache's file for ``content`` and the versions of the compilers."""
    key = json.dumps({**content, "format": _FORMAT, "versions": _versions()}, sort_keys=True)
    return cache_dir / folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def write(path: Path, content: Any) -> None:
    """Write a file of the cache atomically: another process may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(path)


@cache
def _versions() -> Mapping[str, str]:
    """Return the versions of the packages that determine a result; libtpu may be missing."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version_of(name)
    return found
