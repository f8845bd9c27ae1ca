"""Sample a quantity on a thread of its own while something runs, for its peak."""

import threading
import time
from collections.abc import Callable

import jax
import psutil

from kvpipe.engine import memory


class Peak:
    """The largest value that ``read`` returned between entering and leaving the context."""

    def __init__(self, read: Callable[[], int], every_s: float = 0.002) -> None:
        """Prepare; ``read`` is called about every ``every_s`` seconds."""
        self._read = read
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.value = 0

    def __enter__(self) -> "Peak":
        self.value = self._read()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.value = max(self.value, self._read())

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.value = max(self.value, self._read())
            time.sleep(self._every_s)


def device_bytes() -> int:
    """Return the bytes of every array that is alive, those not yet ready included."""
    return sum(memory.bytes_of(jax.live_arrays()))


def rss_bytes() -> int:
    """Return the resident set of this process, mapped files included."""
    return psutil.Process().memory_info().rss
