"""Do something again and again on a thread of its own, until told to stop."""

import threading
from collections.abc import Callable


class Ticker:
    """Calls ``work`` while its context is entered.

    An exception of ``work`` ends the thread, as any thread, with a traceback on stderr; it never
    reaches the code in the context.

    Args:
        name: name of the thread.
        work: what is done; it returns the seconds until the next time.
    """

    def __init__(self, name: str, work: Callable[[], float]) -> None:
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"kvpipe::{name}", daemon=True)

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._work()):
            pass
