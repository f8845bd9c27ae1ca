"""Limit the time of the main thread, also while a write blocks or code does not end.

A thread of its own could not be ended, so this uses the process's interval timer.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kvpipe.errors import TimedOut


@contextmanager
def limited(seconds: float | None, message: str) -> Iterator[None]:
    """Interrupt the body after ``seconds``; None means no limit. For the main thread only.

    Raises:
        TimedOut: with ``message``.
    """
    if seconds is None:
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimedOut(message)

    before = signal.signal(signal.SIGALRM, expire)
    # A timer of zero seconds would never fire.
    outer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        # The caller's own timer goes on.
        signal.setitimer(signal.ITIMER_REAL, *outer)
