"""Call a function periodically on a thread until it is stopped."""

import threading
from collections.abc import Callable


class PeriodicThread:
    """Call ``work`` periodically between start and stop, or while the context is open.

    It returns the seconds until its next call; the first is after ``first_s`` seconds. An exception
    from it ends the thread with a traceback on stderr, as in any thread; it never reaches the
    thread that started it.
    """

    def __init__(self, name: str, work: Callable[[], float], first_s: float = 0.0) -> None:
        self._work = work
        self._first_s = first_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"kvpipe::{name}", daemon=True)

    def __enter__(self) -> "PeriodicThread":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the thread; call it once only."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and join it."""
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        wait_s = self._first_s
        while not self._stop.wait(wait_s):
            wait_s = self._work()
