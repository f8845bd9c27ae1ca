"""Defer termination signals to points where no record is half-written.

Ctrl-C must not lose a half-written record, or a message from the worker that is read but not yet
recorded. So a signal is raised only in the sections that allow it, and waits elsewhere.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

import psutil

from kvpipe.errors import Interrupted

# SIGQUIT too: the engine's threads may send it, and its default would end the run without a record.
# SIGUSR2: submitit lets SLURM send it some time before a job's time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
# Some launchers forward to a child the Ctrl-C that the terminal has already sent to it.
_SAME_PRESS_S = 0.25


class DeferredSignals:
    """Context that handles the termination signals of a run.

    The first signal is raised once :meth:`allowed` allows it. A further one kills every child, so
    that nothing remains to wait for, and the run ends at once with its record.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._allowed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            # If SIGHUP is ignored (nohup), the run is meant to outlive the terminal.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Allow a signal to interrupt the body.

        Raises:
            Interrupted: a signal came, in the body or before it.
        """
        self._allowed = True
        try:
            if self._first is not None:
                raise Interrupted(self._first[0])
            yield
        finally:
            self._allowed = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = signum, now
            if self._allowed:
                raise Interrupted(signum)
        elif now - self._first[1] > _SAME_PRESS_S:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
