"""Generate for many requests at once, in the same batches each time, with log-probabilities.

A rollout may be paused with requests half-way and resumed; :mod:`kvpipe.engine.pause` says why that is
safe.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from kvpipe.config.schema import SamplingConfig
from kvpipe.engine import multihost
from kvpipe.engine.rollout_hooks import RolloutHooks
from kvpipe.engine.scheduler_thread import result_of
from kvpipe.engine.sglang import SglangEngine, json_plain, parameters
from kvpipe.errors import EngineError
from kvpipe.pipeline.rollout import Paused, Piece, Request, Rollout, Sample
from kvpipe.records import progress
from kvpipe.units import counted


@dataclass(frozen=True)
class InFlight:
    """A rollout with its requests in the engine.

    Attributes:
        requests: its requests.
        sampling: how their tokens are chosen.
        name: its name in the hooks.
        ids: the ids of the requests in the engine.
        answers: gets the engine's answers once all requests have ended; on the first host.
        paused: its state at the pause; None before.
        made: the tokens of each request at its pause.
    """

    requests: Sequence[Request]
    sampling: SamplingConfig
    name: str
    ids: Sequence[str]
    answers: Future[Any] | None = None
    paused: Paused | None = None
    made: Sequence[Piece] = ()

    @property
    def at_pause(self) -> Paused:
        """The state at its pause; only for a rollout that was paused."""
        assert self.paused is not None, "pause() has returned it"
        return self.paused


def roll_out(
    engine: SglangEngine, requests: Sequence[Request], sampling: SamplingConfig
) -> Rollout:
    """Generate a sample for each request, and return once the engine is idle again.

    Args:
        engine: the engine.
        requests: the requests, at least one; each has its own seed.
        sampling: how their tokens are chosen.

    Raises:
        EngineError: the engine cannot generate now, or failed.
    """
    begun = _new(engine, requests, sampling)
    with _progress(engine, begun), engine.generating() as origin:
        received = _received(engine, _handed_over(engine, begun))
    _hooks(engine).forget(begun.name)
    return _rollout(begun, received, origin)


def pause(
    engine: SglangEngine,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    after_tokens: int,
) -> InFlight:
    """Begin a rollout, and stop it with requests half-way; they stay in the engine.

    Until :func:`resume` the engine refuses other requests and a flush. Its KV cache may be offloaded
    and restored, and its weights may be exchanged.

    Args:
        engine: the engine.
        requests: the requests, at least one; each has its own seed.
        sampling: how their tokens are chosen.
        after_tokens: number of new tokens, of all requests together, at which it stops; it may have
            a few steps' more, until a request is half-way.

    Raises:
        EngineError: the engine cannot generate now, or failed, or all requests ended before.
    """
    hooks = _hooks(engine)
    begun = _new(engine, requests, sampling)

    def ended() -> None:
        if begun.answers is not None and begun.answers.done():
            begun.answers.result()  # raises what went wrong
        finished, tokens = hooks.done(begun.name)
        if finished == len(requests) and not reached.done():
            hooks.pause_missed()
            raise EngineError(
                f"all {counted(finished, 'request')} ended with {counted(tokens, 'token')}, and none "
                f"was unfinished at the pause after {after_tokens} (pause_after_tokens)"
            )

    with _progress(engine, begun), engine.generating() as origin:
        reached = hooks.pause_after(begun.name, after_tokens)
        begun = _handed_over(engine, begun)
        half_way = result_of(reached, engine.failure, ended)
        hooks.paused(begun.name, half_way)
        engine.requests.stay_in_flight()
    finished, _ = hooks.done(begun.name)
    known = [hooks.known(request_id)[0] for request_id in begun.ids]
    made = [_piece(*one) for one in zip(requests, known, strict=True)]
    tokens = tuple(map(len, known))
    return replace(begun, paused=Paused(tokens, finished, len(half_way), **origin), made=made)


def resume(engine: SglangEngine, paused: InFlight, recompute: bool = False) -> Rollout:
    """Finish a paused rollout, and return once the engine is idle again.

    Args:
        engine: the engine.
        paused: what :func:`pause` returned.
        recompute: flush the prefix cache, and compute prompts and tokens so far again by the weights
            that the engine has now.

    Raises:
        EngineError: no rollout is paused, the engine lacks its KV cache or weights, or it failed.
    """
    hooks = _hooks(engine)
    engine.requests.go_on()
    if recompute:

        def again() -> None:
            hooks.retract()
            engine.flush_now()

        engine.on_scheduler.call(again)
    with _progress(engine, paused), engine.generating() as origin:
        engine.on_scheduler.call(lambda: hooks.go_on(paused.name))
        received = _received(engine, paused)
    hooks.forget(paused.name)
    return _rollout(paused, received, origin)


def _hooks(engine: SglangEngine) -> RolloutHooks:
    assert engine.rollouts is not None, "an engine that kvpipe has started has them"
    return engine.rollouts


def _new(engine: SglangEngine, requests: Sequence[Request], sampling: SamplingConfig) -> InFlight:
    return InFlight(requests, sampling, *_hooks(engine).new_ids(len(requests)))


def _progress(engine: SglangEngine, begun: InFlight) -> AbstractContextManager[None]:
    """Report the requests and tokens of a rollout within the context."""
    count, hooks = len(begun.requests), _hooks(engine)
    total = {
        progress.REQUESTS: count,
        progress.TOKENS: count * begun.sampling.max_new_tokens,
    }

    def so_far() -> dict[str, int]:
        return dict(zip(total, hooks.done(begun.name), strict=True))

    return progress.under_way(progress.GENERATING, total, so_far)


def _handed_over(engine: SglangEngine, begun: InFlight) -> InFlight:
    """Send the requests to the engine; the first host's forwards them to those of the others."""
    if multihost.rank() > 0:
        return begun

    def ask() -> Any:
        prompts = [list(request.prompt_ids) for request in begun.requests]
        chosen = [parameters(begun.sampling, request.seed or 0) for request in begun.requests]
        return _ask(engine.engine, rid=list(begun.ids), input_ids=prompts, sampling_params=chosen)

    return replace(begun, answers=engine.on_caller.begin(ask))


def _received(engine: SglangEngine, begun: InFlight) -> Mapping[str, Any]:
    """Wait for the answers; return them, and the records of the hooks, on every host."""
    hooks, found = _hooks(engine), None
    if begun.answers is not None:
        answers, ended = result_of(begun.answers, engine.failure), time.monotonic()
        engine.wait_idle()  # an answer comes before the hooks have seen its last token
        found = json_plain(
            {
                "answers": answers,
                "hooks": [hooks.known(request_id) for request_id in begun.ids],
                "duration_s": hooks.seconds(begun.name, ended),
                "went_on": hooks.went_on(begun.name),
            }
        )
    return multihost.of_first(found, engine.failure.raise_if_failed)


def _rollout(begun: InFlight, received: Mapping[str, Any], origin: Mapping[str, Any]) -> Rollout:
    answers = received["answers"]
    each = zip(begun.requests, answers, received["hooks"], strict=True)
    samples = [_sample(*one) for one in each]
    answered = zip(samples, begun.ids, answers, strict=True)
    return Rollout(
        samples,
        received["duration_s"],
        **origin,
        unlike=tuple(one[0].name for one in answered if not _is_answered(*one)),
        paused=begun.paused,
        **received["went_on"],
    )


def _is_answered(sample: Sample, request_id: str, answer: Mapping[str, Any]) -> bool:
    """Return whether a sample has the tokens of the engine's own answer to its request.

    The answer's ids are without special tokens and without the one that ended it; its number of
    tokens counts them.
    """
    meta, made = answer["meta_info"], iter(sample.token_ids)
    in_order = all(token in made for token in answer["output_ids"])
    return in_order and (meta["id"], meta["completion_tokens"]) == (
        request_id,
        len(sample.token_ids),
    )


def _ask(engine: Any, **requests: Any) -> Any:
    """Send requests to the engine's tokenizer manager; return the answers, in the same order."""
    from sgl_jax.srt.managers.io_struct import GenerateReqInput

    answers = engine.tokenizer_manager.generate_request(GenerateReqInput(**requests), None)
    return _event_loop(engine).run_until_complete(anext(answers))


def _event_loop(engine: Any) -> asyncio.AbstractEventLoop:
    """Return the loop on which the engine's front end receives answers.

    Since bd09a87 the engine has one of its own; before, the front end takes the calling thread's.
    """
    if (loop := getattr(engine, "loop", None)) is not None:
        return loop
    try:
        return asyncio.get_event_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        return loop


def _piece(request: Request, known: Sequence[tuple[int, float]]) -> Piece:
    """Return the tokens that a request has at a pause."""
    ids, logprobs = ([each[place] for each in known] for place in (0, 1))
    return Piece(
        request.prompt, request.index, (), tuple(map(int, ids)), tuple(map(float, logprobs))
    )


def _sample(request: Request, answer: Mapping[str, Any], known: Sequence[Any]) -> Sample:
    """Return the sample of a request from the engine's answer and the records of the hooks."""
    meta, (tokens, first_token_s) = answer["meta_info"], known
    return Sample(
        prompt=request.prompt,
        index=request.index,
        seed=request.seed,
        text=answer["text"],
        token_ids=tuple(token for token, _ in tokens),
        logprobs=tuple(logprob for _, logprob in tokens),
        finish_reason=meta["finish_reason"]["type"],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        first_token_s=round(first_token_s, 6),
    )
