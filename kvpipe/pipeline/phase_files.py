"""Load the phase files, and report a mistake in one as wrong input, with file and line.

A file is executed under a private module name, so that no module or package of the user's can take
its place. Nothing here may import jax.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

from kvpipe.errors import InputError, KvpipeError
from kvpipe.pipeline.phase import Effect, OnFailure, ParentPhase, Phase, WorkerPhase
from kvpipe.suggest import nearest
from kvpipe.system import places

_MODULE = "kvpipe_phase_"
_BASES = (WorkerPhase, ParentPhase)
_METHODS = ("run", "effect_given", "in_later_cycle")
_OPTION_TYPES = (bool, int, float, str)


def phase_names() -> list[str]:
    """Return the names that ``use`` accepts: the files in ``phases/``."""
    return sorted(path.stem for path in places.PHASES.glob("*.py") if path.stem != "__init__")


@cache
def phase_class(use: str) -> type[Phase]:
    """Return the one phase class of ``phases/<use>.py``.

    Raises:
        InputError: there is no such file, it cannot be executed, or its class is not a phase.
    """
    names = phase_names()
    if use not in names:
        raise InputError(f"there is no phases/{use}.py; {nearest(use, names)}")
    path = places.PHASES / f"{use}.py"
    module = _load(path)
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


def module_of(cls: type[Phase]) -> ModuleType:
    """Return the module of a phase's class."""
    return sys.modules[cls.__module__]


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
        if (line := _last_line(path, error)) is None:
            raise
        raise _refusal(path, line, _reason(error)) from error


def _load(path: Path) -> ModuleType:
    name = f"{_MODULE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pickle and inspect look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _refusal(path, _last_line(path, error), _reason(error)) from error
    return module


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


def _last_line(path: Path, error: BaseException) -> int | None:
    """Return the last line of a file that an exception came through; None if it did not."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((at.lineno for at in reversed(frames) if at.filename == str(path)), None)


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _refusal(path: Path, line: int | None, reason: str) -> InputError:
    where = f", line {line}" if line else ""
    return InputError(f"phases/{path.name}{where}: {reason}")
