"""Find the phases, load them, and report a mistake in one as wrong input, with file and line.

A phase is a file of kvpipe's, a file in a directory of ``phase_path``, or an entry point of the group
``kvpipe.phases`` that an installed package brings along. Nothing here may import jax.
"""

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from kvpipe.errors import InputError, KvpipeError
from kvpipe.pipeline.phase import Effect, OnFailure, ParentPhase, Phase, WorkerPhase
from kvpipe.suggest import nearest
from kvpipe.system import places, plugins

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "kvpipe.phases"
_MODULE = "kvpipe_phase_"
_BASES = (WorkerPhase, ParentPhase)
_METHODS = ("run", "effect_given", "in_later_cycle")
_OPTION_TYPES = (bool, int, float, str)


@dataclass(frozen=True)
class _Place:
    """A file or an entry point that has a phase."""

    at: "Path | EntryPoint"

    @property
    def shipped(self) -> bool:
        return isinstance(self.at, Path) and _is_shipped(self.at)

    @property
    def shown(self) -> str:
        return _shown(self.at) if isinstance(self.at, Path) else plugins.described(self.at)


def phase_names(path: Sequence[str] = ()) -> list[str]:
    """Return the names that ``use`` accepts with this ``phase_path``.

    Raises:
        InputError: one of its directories does not exist.
    """
    files = (file for folder in _folders(path) for file in folder.glob("*.py"))
    names = {file.stem for file in files} | {*plugins.installed(ENTRY_POINTS)}
    return sorted(filter(_is_name, names))


def check_path(path: Sequence[str]) -> None:
    """Refuse a ``phase_path`` with a directory that does not exist.

    Raises:
        InputError: there is one.
    """
    _folders(path)


def phase_class(use: str, path: Sequence[str] = ()) -> type[Phase]:
    """Return the class of the phase ``use``.

    Raises:
        InputError: there is no such phase, its code cannot be executed, its class is not a phase, or
            it takes the name of another phase without saying so.
    """
    found = _places(use, path)
    if not found:
        raise InputError(f"there is no phase {use!r}; {nearest(use, phase_names(path))}")
    cls = _class_at(found[0], _stamp(found[0]))
    others = [place.shown for place in found[1:]]
    if others and not cls.replaces:
        raise InputError(
            f"{found[0].shown}: {others[0]} has the name {use!r} too; choose another name, or write "
            f"'replaces = True' into class {cls.__name__} if it takes the place of that phase"
        )
    return cls


def origin_of(use: str, path: Sequence[str] = ()) -> plugins.Origin | None:
    """Return where the code of a phase is, for records; None for kvpipe's own.

    Raises:
        InputError: as of :func:`phase_class`.
    """
    cls, (place, *_) = phase_class(use, path), _places(use, path)
    return None if place.shipped else plugins.origin(place.at, cls)


def module_of(cls: type[Phase]) -> ModuleType:
    """Return the module of a phase's class."""
    return sys.modules[cls.__module__]


def is_file(cls: type[Phase]) -> bool:
    """Whether a phase's class is the one of its file, not one of several of a package's module."""
    return cls.__module__.startswith(_MODULE)


@cache
def option_types(cls: type[Phase]) -> dict[str, Any]:
    """Return the name and type of each option of a phase."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.name != "step"}


def effect_of(phase: Phase, before: frozenset[str]) -> Effect:
    """Return the effect that a phase declares, given the facts before it.

    Raises:
        InputError: the phase's own code fails, or returns something else.
    """
    with blamed_on(type(phase)):
        effect = cast("object", phase.effect_given(before))
    if not isinstance(effect, Effect):
        reason = f"effect_given returned {effect!r}, not an Effect"
        raise _refusal(_file(type(phase)), _line_of(type(phase)), reason)
    return effect


@contextmanager
def blamed_on(cls: type[Phase]) -> Iterator[None]:
    """Report an exception that the code of a phase's file raises as an InputError in that file."""
    try:
        yield
    except KvpipeError:
        raise
    except (Exception, SystemExit) as error:
        path = _file(cls)
        at = plugins.last_line(error, [path])
        if at is None and _is_shipped(path):
            raise
        raise _refusal(path, at and at[1], plugins.reason_of(error)) from error


def _folders(path: Sequence[str]) -> tuple[Path, ...]:
    """Return the directories of phase files, each once; the one that ships with kvpipe is the last."""
    return _folders_from(Path.cwd(), tuple(path), places.PHASES)


@cache
def _folders_from(here: Path, path: tuple[str, ...], shipped: Path) -> tuple[Path, ...]:
    found = {}
    for folder in map(Path, path):
        if not (here / folder).is_dir():
            raise InputError(f"phase_path: there is no directory {folder}")
        found[(here / folder).resolve()] = here / folder
    found.pop(shipped.resolve(), None)
    return (*found.values(), shipped)


def _is_name(use: str) -> bool:
    return "/" not in use and not use.startswith(("_", "."))


def _places(use: str, path: Sequence[str]) -> list[_Place]:
    """Return every place that has a phase of this name, in the order of the search."""
    if not _is_name(use):
        return []
    files = [folder / f"{use}.py" for folder in _folders(path)]
    # A link that leads nowhere counts: that it cannot be executed is another message.
    found = [_Place(file) for file in files if os.path.lexists(file)]
    own = [place for place in found if not place.shipped]
    points = plugins.installed(ENTRY_POINTS).get(use, ())
    if not own and points:
        plugins.only(points)
    return [*own, *map(_Place, points), *(place for place in found if place.shipped)]


def _stamp(place: _Place) -> Any:
    """Return a value that changes with the file of a phase; a sweep may take hours."""
    with suppress(OSError):
        if isinstance(place.at, Path):
            state = place.at.stat()
            return state.st_mtime_ns, state.st_size
    return None


@cache
def _class_at(place: _Place, stamp: Any) -> type[Phase]:
    """Return the phase of a file or an entry point; the stamp is that of its file."""
    if isinstance(place.at, Path):
        return _only_phase(place.at)
    cls = plugins.load_class(place.at)
    if not issubclass(cls, Phase):
        raise InputError(
            f"{place.shown}: {cls.__name__} does not extend WorkerPhase or ParentPhase"
        )
    if mistake := _mistake(cls):
        raise _refusal(_file(cls), _line_of(cls), f"class {cls.__name__}: {mistake}")
    return cls


def _only_phase(path: Path) -> type[Phase]:
    """Return the one phase of a file."""
    # Two directories may have files of one name.
    mark = "" if _is_shipped(path) else f"_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    module = plugins.load_file(path, _shown(path), f"{_MODULE}{path.stem}{mark}")
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Phase) and cls.__module__ == module.__name__
    ]
    if not found:
        raise _refusal(path, None, "no class extends WorkerPhase or ParentPhase")
    if others := [cls.__name__ for cls in found[1:]]:
        reason = f"{', '.join(others)} is a second phase; write one class in each file"
        raise _refusal(path, _line_of(found[1]), reason)
    if mistake := _mistake(found[0]):
        raise _refusal(path, _line_of(found[0]), f"class {found[0].__name__}: {mistake}")
    return found[0]


def _mistake(cls: type[Phase]) -> str | None:
    """Return what is wrong with the declaration of a phase; None if nothing is."""
    if not issubclass(cls, _BASES):
        return "extend WorkerPhase or ParentPhase, not Phase"
    if cls.run in [base.run for base in _BASES]:
        return "it has no method run(self, ctx)"
    for name in _METHODS:
        expected = list(inspect.signature(getattr(_base(cls), name)).parameters)
        try:
            inspect.signature(getattr(cls, name)).bind(*expected)
        except TypeError as error:
            return f"{name} must accept ({', '.join(expected)}): {error}"
    if cls.effect_given is Phase.effect_given and not isinstance(
        getattr(cls, "effect", None), Effect
    ):
        return "set effect = Effect(...), or override effect_given"
    if not isinstance(cast("object", cls.on_failure), OnFailure):
        return f"on_failure is {cls.on_failure!r}, not a value of OnFailure"
    try:
        types = option_types(cls)
    except NameError as error:
        return f"an option's type is unknown: {error}"
    wrong = next((name for name, kind in types.items() if not _is_option_type(kind)), None)
    if wrong:
        return (
            f"option {wrong!r} is of type {types[wrong]}; an option is a bool, int, float or str, "
            "a tuple[..., ...] of one of them, or one of these or None"
        )
    return None


def _base(cls: type[Phase]) -> type[Phase]:
    return next(base for base in _BASES if issubclass(cls, base))


def _is_option_type(kind: Any) -> bool:
    given = get_args(kind)
    if NoneType in given:
        others = [arg for arg in given if arg is not NoneType]
        return len(others) == 1 and _is_option_type(others[0])
    if get_origin(kind) is tuple:
        return given[1:] == (Ellipsis,) and given[0] in _OPTION_TYPES
    return kind in _OPTION_TYPES


def _file(cls: type[Phase]) -> Path:
    return Path(module_of(cls).__file__ or "")


def _line_of(cls: type[Phase]) -> int:
    return inspect.getsourcelines(cls)[1]


def _is_shipped(path: Path) -> bool:
    return path.parent == places.PHASES


def _shown(path: Path) -> str:
    """Return the name of a file for messages."""
    if _is_shipped(path):
        return f"phases/{path.name}"
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _refusal(path: Path, line: int | None, reason: str) -> InputError:
    where = f", line {line}" if line else ""
    return InputError(f"{_shown(path)}{where}: {reason}")
