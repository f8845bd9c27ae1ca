"""Generate for many requests at once, in the same batches each time, with log-probabilities."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from kvpipe.config.schema import SamplingConfig
from kvpipe.engine import multihost
from kvpipe.engine.rollout_hooks import rollout_of
from kvpipe.engine.sglang import SglangEngine, json_plain, parameters
from kvpipe.pipeline.rollout import Request, Rollout, Sample
from kvpipe.records import progress


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
    hooks = engine.rollouts
    ids = hooks.new_ids(len(requests))
    rollout = rollout_of(ids[0])
    assert rollout is not None
    total = {
        progress.REQUESTS: len(requests),
        progress.TOKENS: len(requests) * sampling.max_new_tokens,
    }

    def so_far() -> dict[str, int]:
        return dict(zip(total, hooks.done(rollout), strict=True))

    def ask() -> Any:
        manager = engine.engine.tokenizer_manager
        prompts = [list(request.prompt_ids) for request in requests]
        chosen = [parameters(sampling, request.seed or 0) for request in requests]
        return _ask(manager, rid=ids, input_ids=prompts, sampling_params=chosen)

    answers, ended = None, 0.0
    with progress.under_way(progress.GENERATING, total, so_far):
        # The first host's engine forwards the requests to those of the others.
        if multihost.rank() == 0:
            answers, ended = engine.on_caller.call(ask), time.monotonic()
        engine.wait_idle()
    held = hooks.taken(rollout)
    of_each = [
        [answer["text"], answer["output_ids"], answer["meta_info"], *held.known(request_id)]
        for request_id, answer in zip(ids, answers or (), strict=bool(answers))
    ]
    found = json_plain({"samples": of_each, "duration_s": ended - (held.began or 0.0)})
    received = multihost.of_first(found, engine.failure.raise_if_failed)
    samples = zip(requests, received["samples"], strict=True)
    return Rollout([_sample(*each) for each in samples], received["duration_s"])


def _ask(manager: Any, **requests: Any) -> Any:
    """Send requests to the engine's tokenizer manager; return the answers, in the same order."""
    from sgl_jax.srt.managers.io_struct import GenerateReqInput

    try:
        loop = asyncio.get_event_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
    answers = manager.generate_request(GenerateReqInput(**requests), None)
    return loop.run_until_complete(anext(answers))


def _sample(request: Request, answer: Sequence[Any]) -> Sample:
    """Return the sample of a request from the engine's answer and what the hooks know."""
    text, token_ids, meta, logprobs, first_token_s = answer
    return Sample(
        prompt=request.prompt,
        index=request.index,
        seed=request.seed,
        text=text,
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=meta["finish_reason"]["type"],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        first_token_s=round(first_token_s, 6),
    )
