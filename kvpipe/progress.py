"""How far a phase is, for people who wait: no record, and no sink keeps it.

Work that takes long says so with :func:`under_way`; who tells it looks from another thread with
:func:`now`, so that the work itself does nothing but count.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from kvpipe.units import gib

LOADING, COMPILING, GENERATING = "loading", "compiling", "generating"
LEAVES, BYTES, PROGRAMS, TOKENS = "leaves", "bytes", "programs", "tokens"


@dataclass(frozen=True)
class Progress:
    """How far the activity is that a phase is at.

    Attributes:
        step: name of the step.
        activity: ``loading``, ``compiling`` or ``generating``.
        elapsed_s: seconds since the activity began; of compiling, what the phase has compiled so far.
        done: how much so far, by unit: ``leaves`` and ``bytes``, ``programs`` or ``tokens``.
        total: how much it will be, by unit; nobody knows how much will be compiled.
    """

    step: str
    activity: str
    elapsed_s: float
    done: Mapping[str, int] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of it."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it as people read it, e.g. ``generating 12/64 tokens, 3.1 s``."""
        if self.activity == COMPILING:
            amounts = [f"program {self.done[PROGRAMS] + 1}"]
        else:
            amounts = [self._amount(unit, done) for unit, done in self.done.items()]
        return f"{self.activity} {', '.join(amounts)}, {self.elapsed_s:.1f} s"

    def _amount(self, unit: str, done: int) -> str:
        write, name = (gib, "GiB") if unit == BYTES else (str, unit)
        return f"{write(done)}/{write(self.total[unit])} {name}"


class Activity:
    """What is under way.

    Args:
        name: ``loading`` or ``generating``.
        total: how much it will be, by unit.
        read: returns how much it is so far, by unit; it is called from another thread.
    """

    def __init__(
        self, name: str, total: Mapping[str, int], read: Callable[[], Mapping[str, int]]
    ) -> None:
        self._name = name
        self._total = total
        self._read = read
        self._began = time.monotonic()

    def progress(self, step: str) -> Progress:
        """Return how far it is."""
        elapsed_s = time.monotonic() - self._began
        return Progress(step, self._name, round(elapsed_s, 3), self._read(), self._total)


_under_way: Activity | None = None


def now() -> Activity | None:
    """Return what is under way in this process; None if nothing says so."""
    return _under_way


@contextmanager
def under_way(
    name: str, total: Mapping[str, int], read: Callable[[], Mapping[str, int]]
) -> Iterator[None]:
    """Say that an activity is under way; its arguments are those of :class:`Activity`.

    There is one at a time, because phases run one after the other.
    """
    global _under_way
    _under_way = Activity(name, total, read)
    try:
        yield
    finally:
        _under_way = None
