"""Code that is not kvpipe's: find it in installed packages, load it, blame its mistakes on it.

A mistake in such code is wrong input, with the file and the line to mend. A file is executed under a
private module name, so that no module or package of the user's can take its place.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvpipe.errors import InputError
from kvpipe.system.versions import distribution_version

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_DIGITS = 12


@dataclass(frozen=True)
class Origin:
    """Origin of code: a path or a package with its version, and the SHA-256 of its file."""

    where: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.where} (sha256 {self.sha256})"


@cache
def installed(group: str) -> "Mapping[str, Sequence[EntryPoint]]":
    """Return the entry points of a group by name; several packages may have one name."""
    # Imported here because `--help` needs little else that takes as long.
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def only(points: "Sequence[EntryPoint]") -> "EntryPoint":
    """Return the entry point of a name.

    Raises:
        InputError: several packages have one of that name.
    """
    if points[1:]:
        named = " and ".join(map(described, points))
        raise InputError(f"{points[0].group}: {named} have the name {points[0].name!r}; keep one")
    return points[0]


def described(point: "EntryPoint") -> str:
    """Return the package, its version and the object of an entry point, for people and records."""
    package = point.dist
    assert package is not None
    return f"{package.name} {distribution_version(package)}, {point.value}"


def load(point: "EntryPoint") -> Any:
    """Import the object of an entry point.

    Raises:
        InputError: its code cannot be executed.
    """
    with blamed_on(f"{point.group}: {described(point)}", roots(point.module)):
        return point.load()


def load_class(point: "EntryPoint") -> type[Any]:
    """Import the class of an entry point.

    Raises:
        InputError: its code cannot be executed, or it is not a class.
    """
    found = load(point)
    if not isinstance(found, type):
        where = f"{point.group}: {described(point)}"
        raise InputError(f"{where}: it is not a class; write {point.name} = 'PACKAGE.MODULE:CLASS'")
    return found


def load_file(path: Path, shown: str, name: str) -> ModuleType:
    """Execute a file as the module ``name``; messages call it ``shown``.

    Raises:
        InputError: it cannot be executed.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pickle and inspect look it up there
    try:
        with blamed_on(shown, [path]):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    return module


def origin(at: "EntryPoint | Path", cls: type[Any]) -> Origin:
    """Return the origin of a class that was loaded from a file or an entry point."""
    return origin_of(str(at) if isinstance(at, Path) else described(at), cls)


def origin_of(where: str, code: Any) -> Origin:
    """Return the origin of a class or a function that was loaded from ``where``."""
    file = Path(sys.modules[code.__module__].__file__ or "")
    return Origin(where, hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS])


def roots(module: str) -> list[Path]:
    """Return the folders of a module's package, or its file; nothing is executed for that."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    found = spec.submodule_search_locations or [spec.origin]
    return [Path(place) for place in found if place]


def last_line(error: BaseException, roots: Sequence[Path]) -> tuple[str, int | None] | None:
    """Return the last file and line below ``roots`` that an exception came through, if any."""
    if isinstance(error, SyntaxError) and error.filename and _is_below(error.filename, roots):
        return error.filename, error.lineno
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next(((at.filename, at.lineno) for at in frames if _is_below(at.filename, roots)), None)


def place_of(error: BaseException, roots: Sequence[Path]) -> str:
    """Return that file and line for the middle of a message; the file only if there are many."""
    file, line = last_line(error, roots) or ("", None)
    inside = f", {file}" if file and [Path(file)] != [*roots] else ""
    return f"{inside}, line {line}" if line else inside


def reason_of(error: BaseException) -> str:
    """Return the class and the message of an exception in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


@contextmanager
def blamed_on(shown: str, roots: Sequence[Path]) -> Iterator[None]:
    """Convert an exception of the code below ``roots`` to an InputError, and print to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        raise InputError(f"{shown}{place_of(error, roots)}: {reason_of(error)}") from error


def _is_below(file: str, roots: Sequence[Path]) -> bool:
    return any(Path(file).is_relative_to(root) for root in roots)
