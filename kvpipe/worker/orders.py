"""The parent's orders: when the worker may begin a step, and when it must begin no further one.

While a step runs, the parent writes the records of those before. What the worker has sent stays in the
pipe for the parent if the worker dies.
"""

import json
import threading

from kvpipe.system.pipes import STOP

_STEPS_AHEAD = 2
"""Steps that may begin before the parent knows them. If both are killed at once, their records are lost.

One is too few: after a rollout come steps of a millisecond, and a row of W&B takes several.
"""


class Orders:
    """Orders as they come in on one thread and are followed on another."""

    def __init__(self) -> None:
        self._begin = threading.Semaphore(0)
        self._stop = threading.Event()
        self._ahead = 0

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
        self._ahead += 1

    def catch_up(self, unknown: int = _STEPS_AHEAD - 1) -> None:
        """Block until the parent lacks at most so many steps that have begun.

        A ``begin`` says that it knows one step more, and has written all records before it.
        """
        while self._ahead > unknown:
            self.wait()
            self._ahead -= 1

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` has come."""
        return self._stop.is_set()
