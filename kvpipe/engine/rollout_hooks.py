"""Hold the requests of a rollout together in the engine's loop, and keep their log-probabilities.

The scheduler composes its batches of the requests that have arrived, so they would depend on timing,
and with them the last bits of what is computed. Here all requests of a rollout wait until the last
one has arrived; from then on the batches depend on the engine's state alone.

A request's id says that it is one of a rollout, and of how many. Every host receives the ids, so
every host does the same with a batch.
"""

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from kvpipe.engine.pause import Pause
from kvpipe.engine.requests import in_batch
from kvpipe.engine.scheduler_thread import SchedulerThread

_OURS = "kvpipe"


@dataclass
class Held:
    """The requests of one rollout.

    Attributes:
        waiting: those that have arrived, until all have.
        began: monotonic time at which the scheduler got all of them.
        tokens: ids and log-probabilities of the tokens so far, by request id. The engine's answer
            leaves out the token that ended a request.
        first_token_s: seconds from ``began`` to the first token, by request id.
        finished: number of requests that have ended.
        half_way: ids of the requests that were half-way at a pause, until they have a step again.
        continued: number of those whose step was one of new tokens.
        recomputed: number of those whose tokens were computed again, although the KV cache had
            them.
        paused: monotonic time of the pause.
    """

    waiting: list[Any] = field(default_factory=list)
    began: float = 0.0
    tokens: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    first_token_s: dict[str, float] = field(default_factory=dict)
    finished: int = 0
    half_way: set[str] = field(default_factory=set)
    continued: int = 0
    recomputed: int = 0
    paused: float = 0.0


class RolloutHooks:
    """Hooks in the engine's loop for the requests of a rollout.

    Each method named after the engine's own wraps it. They run on the scheduler's thread, but for
    :meth:`_forward`, which runs on the one that launches the steps.
    """

    def __init__(self, scheduler: Any, thread: SchedulerThread) -> None:
        self._pause = Pause(scheduler, thread)
        self._held: dict[str, Held] = {}
        self._numbers = itertools.count()
        self._wanted = False
        self._resolved: Sequence[float] | None = None
        client = scheduler.tp_worker
        self._receive = _wrap(scheduler, "process_input_requests", self._wait_for_all)
        self._run_batch = _wrap(scheduler, "run_batch", self._note_batch)
        self._finish_batch = _wrap(scheduler, "process_batch_result", self._share_out)
        self._launch = _wrap(client, "forward_batch_generation", self._mark)
        self._resolve = _wrap(client, "resolve_last_batch_result", self._keep)
        self._compute = _wrap(client.worker, "forward_batch_generation", self._forward)

    def new_ids(self, count: int) -> tuple[str, list[str]]:
        """Return the name of a new rollout, and the ids of its requests."""
        rollout = str(next(self._numbers))
        self._held[rollout] = Held()
        return rollout, [f"{_OURS}/{rollout}/{place}/{count}" for place in range(count)]

    def known(self, request_id: str) -> tuple[Sequence[tuple[int, float]], float]:
        """Return ids and log-probabilities of a request's tokens, and the seconds to the first one.

        They are complete once the engine is idle.
        """
        held = self._held[_rollout_of(request_id) or ""]
        return held.tokens.get(request_id, ()), held.first_token_s.get(request_id, 0.0)

    def done(self, rollout: str) -> tuple[int, int]:
        """Return the ended requests and the new tokens so far; safe from any thread."""
        held = self._held[rollout]
        return held.finished, sum(map(len, list(held.tokens.values())))

    def pause_after(self, rollout: str, tokens: int) -> Future[list[Any]]:
        """Pause once a rollout has ``tokens`` new tokens; the future gets its unfinished requests."""
        return self._pause.when(lambda: self.done(rollout)[1] >= tokens)

    def pause_missed(self) -> None:
        """Make no pause in a rollout that has ended before it."""
        self._pause.forget()

    def paused(self, rollout: str, half_way: Sequence[Any]) -> None:
        """Note which requests of a rollout are half-way, at its pause."""
        held = self._held[rollout]
        held.paused, held.half_way = time.monotonic(), {request.rid for request in half_way}

    def retract(self) -> None:
        """Let a prefill compute the paused requests again, after a flush; on the scheduler's thread."""
        self._pause.retract()

    def go_on(self, rollout: str) -> None:
        """End the pause of a rollout, which takes no part of its seconds; on the scheduler's thread."""
        held = self._held[rollout]
        held.began += time.monotonic() - held.paused
        self._pause.go_on()

    def went_on(self, rollout: str) -> dict[str, int]:
        """Return how many of the requests half-way went on as they were, and were computed again."""
        held = self._held[rollout]
        return {"continued": held.continued, "recomputed": held.recomputed}

    def seconds(self, rollout: str, ended: float) -> float:
        """Return the seconds from the hand-over of all requests to ``ended``, a monotonic time."""
        return ended - self._held[rollout].began

    def forget(self, rollout: str) -> None:
        """Forget a rollout, whose requests have ended."""
        del self._held[rollout]

    def _wait_for_all(self, requests: list[Any]) -> None:
        """Hand the requests of a rollout over once all are there."""
        now = []
        for request in requests:
            rollout = _rollout_of(getattr(request, "rid", None))
            if rollout is None:
                now.append(request)
                continue
            held = self._held[rollout]
            held.waiting.append(request)
            if len(held.waiting) == int(request.rid.rpartition("/")[2]):
                held.began = time.monotonic()
                now += held.waiting
                held.waiting = []
        self._receive(now)

    def _note_batch(self, batch: Any) -> Any:
        """Note whether a batch has a request of a rollout, for the engine's later calls with it."""
        self._wanted = False
        for request in in_batch(batch):
            if (rollout := _rollout_of(request.rid)) is not None:
                self._wanted = True
                held = self._held[rollout]
                if request.rid in held.half_way:
                    held.half_way.remove(request.rid)
                    again = batch.forward_mode.is_extend()
                    held.continued += not again
                    held.recomputed += again
        return self._run_batch(batch)

    def _mark(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        batch.wants_logprobs = self._wanted
        return self._launch(batch, *args, **kwargs)

    def _forward(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step; leave the log-probabilities where the engine looks for them.

        Its own (``return_logprob``) kill the engine in 0.0.2, and are at the request's temperature.
        """
        output, ids, *others = self._compute(batch, *args, **kwargs)
        if getattr(batch, "wants_logprobs", False):
            output.next_token_logprobs = _logprobs(output.next_token_logits, ids)
        return output, ids, *others

    def _keep(self, *args: Any, **kwargs: Any) -> Any:
        resolved = self._resolve(*args, **kwargs)
        self._resolved = resolved[0].next_token_logprobs
        return resolved

    def _share_out(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Process a batch's result; give each request that got a token its log-probability."""
        requests = in_batch(batch)
        before = [len(request.output_ids) for request in requests]
        self._resolved = None
        done = self._finish_batch(batch, *args, **kwargs)
        for request, had, value in zip(requests, before, self._resolved or (), strict=False):
            rollout = _rollout_of(request.rid)
            if rollout and len(request.output_ids) > had:
                held = self._held[rollout]
                token = (request.output_ids[-1], value)
                held.tokens.setdefault(request.rid, []).append(token)
                held.first_token_s.setdefault(request.rid, time.monotonic() - held.began)
                held.finished += bool(request.finished())
        return done


def _rollout_of(request_id: str | None) -> str | None:
    """Return the rollout of a request, as its id says; None if it is of none."""
    ours, _, rest = (request_id or "").partition("/")
    return rest.partition("/")[0] if ours == _OURS else None


def _wrap(owner: Any, name: str, function: Any) -> Any:
    """Put ``function`` in the place of a method; return the method."""
    method = getattr(owner, name)
    setattr(owner, name, function)
    return method


@jax.jit
def _logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the log-probability of each row's token: (batch, vocabulary), (batch,) -> (batch,).

    It is picked out by a sum: later versions divide the vocabulary explicitly, and jax indexes no
    such axis.
    """
    whole = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    is_chosen = jnp.arange(whole.shape[-1]) == ids[:, None]
    return jnp.where(is_chosen, whole, 0.0).sum(axis=-1)
