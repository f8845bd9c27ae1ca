"""The parent's orders: when the worker may begin a step, and when it must begin no further one.

The worker runs at most one step ahead of the parent: while a step runs, the parent writes the record
of the one before. What the worker has sent stays in the pipe for the parent if the worker dies.
"""

import json
import threading

from kvpipe.system.pipes import STOP


class Orders:
    """Orders as they come in on one thread and are followed on another."""

    def __init__(self) -> None:
        self._begin = threading.Semaphore(0)
        self._stop = threading.Event()
        self._ahead = False

    def take(self, line: str) -> None:
        """Take a line of the parent: an object with the key ``begin`` or ``stop``."""
        if STOP in json.loads(line):
            self._stop.set()
        else:
            self._begin.release()

    def wait(self) -> None:
        """Block until the next ``begin``."""
        self._begin.acquire()

    def began(self) -> None:
        """Note that a step has begun, which was reported to the parent."""
        self._ahead = True

    def catch_up(self) -> None:
        """Block until the parent knows the last step that began: its ``begin`` comes then, once."""
        if self._ahead:
            self.wait()
        self._ahead = False

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` has come."""
        return self._stop.is_set()
