"""Notice that a thread of the engine has failed, and tell the caller why.

The engine's threads log their exception and send SIGQUIT, to the process or to its parent, whose
handler kills everything. Here the log line is kept, the signal reaches this process alone, and the
next call into the engine raises :class:`kvpipe.errors.EngineError`.
"""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import psutil

from kvpipe.errors import EngineError

_THREAD_FAILURE = "hit an exception"


class FailureWatch(logging.Handler):
    """Keeps the last failure that a thread of the engine has logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._failed = threading.Event()
        self._reason = ""
        logging.getLogger("sgl_jax").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the reason from the engine's own error log."""
        message = record.getMessage()
        if _THREAD_FAILURE in message or "watchdog timeout" in message.lower():
            self._reason = message
            self._failed.set()

    def raise_if_failed(self) -> None:
        """Raise what happened, if a thread of the engine has failed.

        Raises:
            EngineError: with the engine's own last line first, then its traceback.
        """
        if self._failed.is_set():
            lines = [line for line in self._reason.strip().splitlines() if line.strip()]
            why = lines[-1].strip() if lines else "it gave no reason"
            raise EngineError(f"the engine failed: {why}") from RuntimeError(self._reason)

    def on_start_failure(self) -> None:
        """Raise out of the engine's constructor, from its signal handler."""
        self._failed.set()
        self.raise_if_failed()

    def watch(self, scheduler: Any) -> None:
        """Let the signals of the engine's threads reach this process, and only set the flag.

        Args:
            scheduler: the started engine's scheduler.
        """
        signal.signal(signal.SIGQUIT, self._on_sigquit)
        itself = psutil.Process()
        for owner in (scheduler, scheduler.tp_worker):
            if hasattr(owner, "parent_process"):
                owner.parent_process = itself

    def _on_sigquit(self, signum: int, frame: FrameType | None) -> None:
        self._failed.set()
