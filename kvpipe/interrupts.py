"""The signals that end a run, taken where nothing can be torn by them.

A record that is half written, or a message of the worker that is read and not yet recorded, must
not be lost to Ctrl-C. So a signal is raised in the stretches that allow it and waits elsewhere.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

import psutil

# SIGQUIT too: the engine's threads may send it, and its default would end the run without a record.
# SIGUSR2 is what submitit lets SLURM send some time before a job's time is over.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
# Some launchers pass on to a child the Ctrl-C that the terminal has sent it already.
_SAME_PRESS_S = 0.25


class Interrupted(BaseException):
    """A signal asked the run to end.

    Attributes:
        signum: its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name} ended the run"


class Interrupts:
    """The signals of a run under way, as a context.

    The first is raised once :meth:`allowed` allows it. A further one kills every child, so that
    nothing is left to wait for, and the run ends at once with its record.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._allowed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            # Who ignores the end of the terminal (nohup) wants the run to outlive it.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let the body be interrupted.

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
