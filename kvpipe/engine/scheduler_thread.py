"""Run callables on the engine's scheduler thread, at a moment when the engine is idle.

Flush, drop, rebuild and swap change state that the scheduler reads without a lock, so only its own
thread may do it. ``generate`` returns before the overlapped last step is processed: until then that
step holds the KV buffers, and the scheduler's leak check would fail.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from kvpipe.engine import multihost
from kvpipe.engine.failure import FailureWatch
from kvpipe.engine.requests import Requests
from kvpipe.errors import EngineError

_POLL_S = 0.05
_IDLE_SLEEP_S = 0.001
_BROADCAST_POLL_MS = 1


class SchedulerThread:
    """Run callables on the scheduler's thread."""

    def __init__(
        self, scheduler: Any, requests: Requests, failure: FailureWatch, idle_timeout_s: float
    ) -> None:
        """Wrap ``scheduler.process_input_requests``, which every scheduler loop calls first."""
        self._scheduler = scheduler
        self._requests = requests
        self._failure = failure
        self._idle_timeout_s = idle_timeout_s
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._woken = threading.Event()
        self._held = False
        self._process_requests = scheduler.process_input_requests
        self._follows = multihost.rank() > 0
        # The scheduler's loop runs already, so it may call these at once.
        if self._follows:
            scheduler.subscriber = _Broadcasts(scheduler.subscriber, self._do_ours)
        scheduler.process_input_requests = self._process_requests_then_ours

    def call[T](self, function: Callable[[], T]) -> T:
        """Run ``function`` on the scheduler's thread once the engine is idle; return its result.

        Raises:
            EngineError: the engine failed, or was not idle within ``idle_timeout_s``.
        """
        future: Future[T] = Future()
        self._queue.put((function, future))
        self._woken.set()
        deadline = time.monotonic() + self._idle_timeout_s

        def give_up_late() -> None:
            if time.monotonic() > deadline and future.cancel():
                raise EngineError(
                    f"the engine was still busy after {self._idle_timeout_s:g} s "
                    f"(runner.idle_timeout_s): {self._business()}"
                )

        return result_of(future, self._failure, give_up_late)

    def hold(self) -> None:
        """Keep the scheduler's thread here, running callables on it, until :meth:`let_go`.

        For the scheduler's own thread, between two steps: nothing of the engine is under way then,
        although it is not idle. Requests wait in its socket meanwhile.
        """
        self._held = True
        while self._held:
            if self._queue.empty():
                self._rest()
            self._do_ours()

    def let_go(self) -> None:
        """End :meth:`hold`; for callables that run within it."""
        self._held = False

    def unhook(self) -> None:
        """Give the scheduler its own method back; nothing may be called any more."""
        self._scheduler.process_input_requests = self._process_requests

    def stop(self) -> None:
        """End the scheduler's thread with SystemExit, which a thread ends on silently."""

        def leave() -> None:
            future.set_result(None)
            raise SystemExit

        future: Future[None] = Future()
        self._queue.put((leave, Future()))
        future.result(timeout=self._idle_timeout_s)

    def _process_requests_then_ours(self, requests: list[Any]) -> None:
        self._process_requests(requests)
        self._requests.received(requests)
        if not requests and self._queue.empty() and not self._follows and self._is_idle():
            # The engine's loop busy-waits while idle, which would take a core and the GIL from the
            # running phase.
            self._rest()
        self._do_ours()

    def _rest(self) -> None:
        """Sleep for a moment, at most until a callable is queued.

        The caller looks into the queue afterwards, so one that comes before ``clear`` is not missed.
        """
        self._woken.wait(_IDLE_SLEEP_S)
        self._woken.clear()

    def _do_ours(self) -> None:
        while not self._queue.empty() and (self._held or self._is_idle()):
            function, future = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _is_idle(self) -> bool:
        return not any(self._work().values())

    def _work(self) -> dict[str, int]:
        """Return the scheduler's pending work by kind, in any supported version."""
        s = self._scheduler
        chunked = getattr(s, "chunked_req", None) or any(getattr(s, "chunked_reqs", None) or ())
        return {
            "on the way": self._requests.on_the_way,
            "waiting": len(s.waiting_queue),
            "running": 0 if s.running_batch.is_empty() else 1,
            "current": int(getattr(s, "cur_batch", None) is not None),
            "last": int(getattr(s, "last_batch", None) is not None),
            "unprocessed": len(getattr(s, "result_queue", None) or ()),
            "chunked": int(bool(chunked)),
        }

    def _business(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in self._work().items() if count)


class _Broadcasts:
    """The socket of the first host's broadcasts, one for each round of its scheduler.

    The first host runs its callables within a round and may wait there for this host to run the
    same ones; it broadcasts nothing until then. So this host runs them while it waits.

    It does not help to replace the engine's loop around ``recv``: the scheduler may be in it already,
    and would stay there. The loop reads ``subscriber`` anew after each timeout of the real socket
    (5 s), and then comes here.

    Args:
        socket: the real one.
        meanwhile: is called again and again while there is no broadcast.
    """

    def __init__(self, socket: Any, meanwhile: Callable[[], None]) -> None:
        self._socket = socket
        self._meanwhile = meanwhile

    def recv(self) -> bytes:
        """Return the next broadcast."""
        while not self._socket.poll(_BROADCAST_POLL_MS):
            self._meanwhile()
        return self._socket.recv()


class CallerThread:
    """Make the blocking front-end calls on one daemon thread.

    On the main thread the front end would run an asyncio loop and install signal handlers, and a
    call would never return once the scheduler has died. Here the main thread waits and polls for
    failures.
    """

    def __init__(self, failure: FailureWatch) -> None:
        self._failure = failure
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def call[T](self, function: Callable[[], T]) -> T:
        """Run ``function`` on the thread and return its result.

        Raises:
            EngineError: a thread of the engine failed meanwhile.
        """
        return result_of(self.begin(function), self._failure)

    def begin[T](self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` on the thread, after those that were begun before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="kvpipe::caller", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._queue.put((function, future))
        return future

    def _loop(self) -> None:
        while True:
            function, future = self._queue.get()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def result_of[T](
    future: Future[T], failure: FailureWatch, each_time: Callable[[], None] = lambda: None
) -> T:
    """Return the result of ``future``; raise if the engine or another host fails meanwhile.

    ``each_time`` is called a few times a second until the result is there.
    """
    while True:
        failure.raise_if_failed()
        multihost.raise_if_failed()
        try:
            return future.result(timeout=_POLL_S)
        except TimeoutError:
            if future.done():
                raise
        each_time()
