"""Stop the engine's loop between two of its steps, with requests half-way, and let it go on.

The loop overlaps: while a step runs on the devices, the scheduler chooses the next one, launches it,
and only then processes the results of the one before. So a pause takes two rounds of the loop. In
the first one the scheduler chooses its next batch as always, but it is kept and not launched: the
loop sees no batch, processes the last results and has nothing outstanding. In the second one its
thread is held before it chooses again. Afterwards the kept batch is launched as if nothing had been.

This is safe, in 0.0.2 and the later versions, because of where a request half-way is kept:

- ``running_batch``, the kept batch and ``waiting_queue`` are the scheduler's own lists, which only its
  thread changes. The kept batch has its slots in the KV cache already, and ``last_batch`` has been
  merged into ``running_batch`` by the choice, so nothing is lost when the loop sets it to None.
- Rows of the KV cache belong to ``req_to_token_pool``, the prefix tree, whose nodes in use are locked,
  and the allocator. None of them changes, so an offload takes the rows of these requests too, and a
  restore brings them back to the same places.
- The kept batch refers to its last tokens by their places in the device's ``future_token_ids_map``.
  The next step would overwrite them, but no step runs during the pause.
- The results that are outstanding are always those of decoding. Those of a prefill may let a request
  use the rows that another one has computed for the same prompt, with other last bits; a loop without
  a pause launches the next step before that.
- Each choice is made, and each slot is taken and freed, in the order of an uninterrupted run, so the
  later batches are the same ones.
- Where the requests are to be computed again, they leave both batches for the front of
  ``waiting_queue``, as the engine itself retracts requests if the KV cache is full. Their tokens
  are complete, since no results are outstanding, and the next prefill computes them again.
- The loop takes a round without a batch for idle only if it had none in the round before, so its
  search for leaked slots, which requests half-way would fail, does not run.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvpipe.engine.requests import emptied, in_batch
from kvpipe.engine.scheduler_thread import SchedulerThread


def _never() -> bool:
    return False


class Pause:
    """A pause of the scheduler that this wraps."""

    def __init__(self, scheduler: Any, thread: SchedulerThread) -> None:
        self._scheduler = scheduler
        self._thread = thread
        self._due: Callable[[], bool] = _never
        self._reached: Future[list[Any]] = Future()
        self._kept: Any = None
        self._choose = scheduler.get_next_batch_to_run
        scheduler.get_next_batch_to_run = self._next_batch

    def when(self, due: Callable[[], bool]) -> Future[list[Any]]:
        """Pause after the first step of decoding at which ``due`` is true and a request is half-way.

        The result is the requests that have tokens and have not ended. ``due`` is called on the
        scheduler's thread, before each step.
        """
        self._reached, self._due = Future(), due
        return self._reached

    def forget(self) -> None:
        """Make no pause that was not reached."""
        self._due = _never

    def go_on(self) -> None:
        """Launch the kept batch; for callables on the scheduler's thread."""
        self._thread.let_go()

    def retract(self) -> None:
        """Let a prefill compute the tokens of all requests again, after a flush that must follow.

        For callables on the scheduler's thread, while the pause lasts.
        """
        scheduler = self._scheduler
        kept = [r for batch in (scheduler.running_batch, self._kept) for r in emptied(batch)]
        requests = [request for request in kept if not request.finished()]
        for request in requests:
            request.reset_for_retract()
            request.req_pool_idx = None  # the latest version leaves that to the pool
        scheduler.waiting_queue[:0] = requests
        if hasattr(scheduler, "chunked_reqs"):  # of each data-parallel rank, in the latest version
            scheduler.chunked_reqs = [None] * len(scheduler.chunked_reqs)
        else:
            scheduler.chunked_req = None
        self._kept = None

    def _next_batch(self) -> Any:
        """Choose the next batch as the engine does; keep it while the pause lasts."""
        if self._kept is None:
            decoding = self._decoding()
            batch = self._choose()
            if batch is None or not decoding or not self._due():
                return batch
            self._kept = batch
            return None
        if half_way := self._half_way():
            self._due = _never
            self._reached.set_result(half_way)
            self._thread.hold()
        if self._kept is None:  # retracted
            return self._choose()
        batch, self._kept = self._kept, None
        return batch

    def _decoding(self) -> bool:
        """Return whether the step whose results are outstanding is one of decoding."""
        last = self._scheduler.last_batch
        return last is not None and last.forward_mode.is_decode()

    def _half_way(self) -> list[Any]:
        """Return the requests with tokens that have not ended; the kept decode is ``running_batch``."""
        running = in_batch(self._scheduler.running_batch)
        return [r for r in running if r.output_ids and not r.finished()]
