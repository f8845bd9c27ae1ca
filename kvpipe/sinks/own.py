"""Receivers of records that installed packages bring along, as entry points ``kvpipe.sinks``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvpipe.errors import InputError
from kvpipe.sinks import Sink
from kvpipe.suggest import nearest
from kvpipe.system import plugins

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "kvpipe.sinks"


def own_sinks(names: Sequence[str], run_dir: Path) -> list[Sink]:
    """Make the named sinks for a run.

    Raises:
        InputError: there is no such sink, or its code fails.
    """
    return [_made(_class(name), name, run_dir) for name in names]


def origins(names: Sequence[str]) -> dict[str, plugins.Origin]:
    """Return the origin of each named sink, for records.

    Raises:
        InputError: there is no such sink, or its code cannot be executed.
    """
    return {name: plugins.origin(_point(name), _class(name)) for name in names}


def _point(name: str) -> "EntryPoint":
    points = plugins.installed(ENTRY_POINTS)
    if name not in points:
        raise InputError(
            f"sinks: no installed package has a sink {name!r}; {nearest(name, points)}"
        )
    return plugins.only(points[name])


def _class(name: str) -> type[Sink]:
    cls = plugins.load_class(_point(name))
    if not issubclass(cls, Sink):
        raise InputError(f"sinks: {name!r} is the class {cls.__name__}, which does not extend Sink")
    return cls


def _made(cls: type[Sink], name: str, run_dir: Path) -> Sink:
    with plugins.blamed_on(f"sinks: {name!r}", plugins.roots(cls.__module__)):
        return cls(run_dir)  # pyright: ignore[reportCallIssue]
