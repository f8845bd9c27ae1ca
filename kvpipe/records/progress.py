"""Progress of a phase, for people who wait; it is neither a record nor kept by a sink.

Long work reports itself with :func:`under_way`; another thread reads it with :func:`now`, so that
the work itself only counts.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvpipe.units import unit_for

LOADING, COMPILING, GENERATING = "loading", "compiling", "generating"
LEAVES, BYTES, PROGRAMS, TOKENS, REQUESTS = "leaves", "bytes", "programs", "tokens", "requests"


@dataclass(frozen=True)
class Progress:
    """Progress of a phase's current activity.

    Attributes:
        step: name of the step.
        activity: ``loading``, ``compiling`` or ``generating``.
        elapsed_s: seconds since the activity began; for compiling, the phase's total so far.
        done: completed amount, by unit: ``leaves`` and ``bytes``, ``programs``, or ``tokens`` and
            ``requests``.
        total: amount in total, by unit; unknown for compiling.
    """

    step: str
    activity: str
    elapsed_s: float
    done: Mapping[str, int] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the progress as text, e.g. ``generating 12/64 tokens, 3.1 s``."""
        if self.activity == COMPILING:
            amounts = [f"program {self.done[PROGRAMS] + 1}"]
        else:
            amounts = [self._amount(unit, done) for unit, done in self.done.items()]
        return f"{self.activity} {', '.join(amounts)}, {self.elapsed_s:.1f} s"

    def _amount(self, unit: str, done: int) -> str:
        total = self.total[unit]
        if unit != BYTES:
            return f"{done}/{total} {unit}"
        suited = unit_for(total)
        return f"{suited.of(done)}/{suited.of(total)} {suited.name}"


@dataclass(frozen=True)
class Activity:
    """An activity in progress.

    ``read`` returns the completed part of ``total``, by unit; it is called from another thread.
    ``began`` is monotonic.
    """

    name: str
    total: Mapping[str, int]
    read: Callable[[], Mapping[str, int]]
    began: float = field(default_factory=time.monotonic)

    def progress(self, step: str) -> Progress:
        """Return its progress."""
        elapsed_s = time.monotonic() - self.began
        return Progress(step, self.name, round(elapsed_s, 3), self.read(), self.total)


_under_way: Activity | None = None


def now() -> Activity | None:
    """Return the activity in progress in this process; None if there is none."""
    return _under_way


@contextmanager
def under_way(
    name: str, total: Mapping[str, int], read: Callable[[], Mapping[str, int]]
) -> Iterator[None]:
    """Register an activity while the context is open; the arguments are those of :class:`Activity`.

    Only one can be in progress, because phases run one at a time.
    """
    global _under_way
    _under_way = Activity(name, total, read)
    try:
        yield
    finally:
        _under_way = None
