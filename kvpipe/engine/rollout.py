"""Generate for many requests at once, in the same batches each time, with log-probabilities."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvpipe.config.schema import SamplingConfig
from kvpipe.engine import multihost
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
    assert hooks is not None, "an engine that kvpipe has started has them"
    rollout, ids = hooks.new_ids(len(requests))
    total = {
        progress.REQUESTS: len(requests),
        progress.TOKENS: len(requests) * sampling.max_new_tokens,
    }

    def so_far() -> dict[str, int]:
        return dict(zip(total, hooks.done(rollout), strict=True))

    def ask() -> Any:
        prompts = [list(request.prompt_ids) for request in requests]
        chosen = [parameters(sampling, request.seed or 0) for request in requests]
        return _ask(engine.engine, rid=ids, input_ids=prompts, sampling_params=chosen)

    with progress.under_way(progress.GENERATING, total, so_far), engine.generating() as origin:
        found = None
        # The first host's engine forwards the requests to those of the others.
        if multihost.rank() == 0:
            answers, ended = engine.on_caller.call(ask), time.monotonic()
            engine.wait_idle()  # an answer comes before the hooks have seen its last token
            found = json_plain(
                {
                    "answers": answers,
                    "hooks": [hooks.known(request_id) for request_id in ids],
                    "duration_s": hooks.seconds(rollout, ended),
                }
            )
        received = multihost.of_first(found, engine.failure.raise_if_failed)
    hooks.forget(rollout)
    each = zip(requests, received["answers"], received["hooks"], strict=True)
    return Rollout([_sample(*one) for one in each], received["duration_s"], **origin)


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


def _sample(request: Request, answer: Mapping[str, Any], known: Sequence[Any]) -> Sample:
    """Return the sample of a request from the engine's answer and what the hooks know."""
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
