"""Let no request reach an engine that cannot generate.

A request that the scheduler meets without a KV cache or without weights kills the engine's forward
thread. So the front end refuses it, and a change of the engine waits for those that it has sent:
they are on their way through a socket, where the idle scheduler does not see them yet.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvpipe.engine.failure import FailureWatch
from kvpipe.errors import EngineError

_CHANGE = "change"
IN_FLIGHT = "in flight"


class Requests:
    """The requests of an engine's front end, from any thread.

    Attributes:
        unavailable: reason → remedy for everything that generating needs and that is missing now.
    """

    def __init__(self, manager: Any, failure: FailureWatch) -> None:
        """Guard the engine's tokenizer manager; ranks after 0 have none and receive no requests."""
        self.unavailable: dict[str, str] = {}
        self._failure = failure
        self._manager = manager
        self._lock = threading.Lock()
        self._on_the_way: set[str] = set()
        if manager is not None:
            self._send, self._generate = manager._send_one_request, manager.generate_request
            manager._send_one_request = self._send_if_available
            manager.generate_request = self._generate_watched

    @property
    def on_the_way(self) -> int:
        """Number of requests that are sent and not yet received by the scheduler."""
        return len(self._on_the_way)

    def received(self, messages: Sequence[Any]) -> None:
        """Note the messages that the scheduler has received."""
        for message in messages:
            self._on_the_way.discard(_id_of(message))

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Refuse all requests within the context; those that are sent already are answered."""
        with self._lock:
            self.unavailable[_CHANGE] = "its KV cache or its weights are being changed"
        try:
            yield
        finally:
            del self.unavailable[_CHANGE]

    def unguard(self) -> None:
        """Give the engine's front end its own methods back."""
        if self._manager is not None:
            self._manager._send_one_request = self._send
            self._manager.generate_request = self._generate

    def _send_if_available(self, obj: Any, tokenized: Any, *others: Any, **more: Any) -> Any:
        with self._lock:  # it may have become unavailable since the check of the whole request
            self.check()
            self._on_the_way.add(_id_of(tokenized))
            return self._send(obj, tokenized, *others, **more)

    def _generate_watched(self, obj: Any, request: Any = None) -> Any:
        self.check()
        return self._generate(obj, _Caller(self._failure) if request is None else request)

    def check(self) -> None:
        """Raise an EngineError if the engine failed or cannot generate."""
        self._failure.raise_if_failed()
        if self.unavailable:
            raise EngineError(f"the engine cannot generate: {'; '.join(self.unavailable.values())}")

    def stay_in_flight(self) -> None:
        """Refuse others until :meth:`go_on`, since requests are half-way."""
        self.unavailable[IN_FLIGHT] = "a rollout is paused with requests half-way; resume it first"

    def go_on(self) -> None:
        """Refuse others no longer, since the requests half-way go on.

        Raises:
            EngineError: there are none, or the engine failed or lacks what they need.
        """
        if (why := self.unavailable.pop(IN_FLIGHT, None)) is None:
            raise EngineError("no rollout is paused, so there is none to resume")
        try:
            self.check()
        except EngineError:
            self.unavailable[IN_FLIGHT] = why
            raise


def in_batch(batch: Any) -> list[Any]:
    """Return the requests of a batch."""
    return [request for part in _parts(batch) for request in part.reqs or ()]


def emptied(batch: Any) -> list[Any]:
    """Take the requests out of a batch, and return them."""
    requests = in_batch(batch)
    for part in _parts(batch):
        part.reqs, part.batch_is_full = [], False
    return requests


def _parts(batch: Any) -> Sequence[Any]:
    """Return the objects that hold the requests of a batch.

    Later versions split them by data-parallel rank.
    """
    return getattr(batch, "reqs_info", None) or (batch,)


def guards(manager: Any) -> bool:
    """Whether the requests of a tokenizer manager are guarded already."""
    return isinstance(getattr(manager.generate_request, "__self__", None), Requests)


class _Caller:
    """A request's caller, whom the front end asks every few seconds whether it has gone.

    An engine that has failed never answers; then the question raises to the caller.
    """

    def __init__(self, failure: FailureWatch) -> None:
        self._failure = failure

    async def is_disconnected(self) -> bool:
        self._failure.raise_if_failed()
        return False


def _id_of(message: Any) -> str:
    found = getattr(message, "rid", "")
    return found[0] if isinstance(found, list) else found
