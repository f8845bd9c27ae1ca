"""Detect that a thread of the engine has failed, and raise its reason to the caller.

The engine's threads log their exception and send SIGQUIT to the process or its parent, whose
handler kills everything. Here the log line is kept, the signal reaches this process alone (see
:func:`kvpipe.engine.compat.failure_signals_stay_here`), and the next call into the engine raises
:class:`kvpipe.errors.EngineError`.
"""

import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil

from kvpipe.engine.compat import replaced, watchdog_ends_with_its_engine
from kvpipe.errors import EngineError

_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
_THREAD_FAILURE = "hit an exception"


class FailureWatch(logging.Handler):
    """Keep the last failure that a thread of the engine has logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._failed = threading.Event()
        self._reason = ""
        self._starting = False
        self._scheduler: Any = None
        logging.getLogger("sgl_jax").addHandler(self)

    def of(self, scheduler: Any) -> None:
        """Watch the threads of this scheduler, whose own watchdog ends when one of them fails."""
        self._scheduler = scheduler

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the reason from the engine's error log."""
        message = record.getMessage()
        if _THREAD_FAILURE in message or "watchdog timeout" in message.lower():
            self._reason = message
            self._fail()

    def raise_if_failed(self) -> None:
        """Raise the failure, if a thread of the engine has failed.

        Raises:
            EngineError: with the engine's own last line first, then its traceback.
        """
        if self._failed.is_set():
            raise EngineError(f"the engine failed: {self._why()}") from RuntimeError(self._reason)

    @property
    def happened(self) -> bool:
        """Whether a thread of the engine has failed."""
        return self._failed.is_set()

    def _why(self) -> str:
        """Return the last line of the traceback that names an exception, else the last line."""
        lines = [line.strip() for line in self._reason.splitlines() if line.strip()]
        named = [line for line in lines if _EXCEPTION.match(line)]
        return (named or lines or ["it gave no reason; its log may"])[-1]

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While the engine's constructor runs, raise where it tries to kill the process.

        At any other time the attempt comes from its shutdown at exit and is ignored: the engine
        must not kill this process's children.
        """
        self._starting = True
        try:
            yield
        finally:
            self._starting = False

    def on_kill(self) -> None:
        """Raise out of the engine's constructor, from its signal handler.

        Raises:
            EngineError: the engine tried to kill the process while it was starting.
        """
        if self._starting:
            self._fail()
            self.raise_if_failed()

    def watch(self) -> None:
        """Make SIGQUIT, which the engine's threads send, only set the failure flag."""
        signal.signal(signal.SIGQUIT, self._on_sigquit)

    @contextmanager
    def instead_of_signals(self) -> Iterator[None]:
        """Within the context, let the engine's threads set the failure flag and send no signal.

        For an engine that the caller made: its threads have the parent process to send to, and its
        front end sets a handler for the signal that kills this process and its children.
        """
        send = psutil.Process.send_signal

        def set_flag(process: psutil.Process, sig: int) -> None:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if sig == signal.SIGQUIT and caller.startswith("sgl_jax."):
                self._fail()
            else:
                send(process, sig)

        with replaced(psutil.Process, "send_signal", set_flag):
            yield

    def end(self) -> None:
        """Stop reading the engine's log."""
        logging.getLogger("sgl_jax").removeHandler(self)

    def _on_sigquit(self, signum: int, frame: FrameType | None) -> None:
        self._fail()

    def _fail(self) -> None:
        self._failed.set()
        if self._scheduler is not None:
            watchdog_ends_with_its_engine(self._scheduler)
