"""Do something again and again on a thread of its own, until told to stop."""

import threading
from collections.abc import Callable


class Ticker:
    """Calls ``work`` from its start to its stop, or while its context is entered.

    An exception of ``work`` ends the thread, as any thread, with a traceback on stderr; it never
    reaches the thread that started it.

    Args:
        name: name of the thread.
        work: what is done; it returns the seconds until the next time.
        first_s: seconds until the first time.
    """

    def __init__(self, name: str, work: Callable[[], float], first_s: float = 0.0) -> None:
        self._work = work
        self._first_s = first_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"kvpipe::{name}", daemon=True)

    def __enter__(self) -> "Ticker":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the thread; once only."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for its end."""
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        wait_s = self._first_s
        while not self._stop.wait(wait_s):
            wait_s = self._work()
