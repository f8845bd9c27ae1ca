"""Tokens per second of a rollout through kvpipe, over those of the engine without any of kvpipe's hooks.

The same requests, all handed over at once, in turns on one engine. Its own methods are put back for
the bare turns, so that its loop runs as it ships. CPU seconds of the process too, since other processes
may take the machine. A rollout has log-probabilities, whose computation counts as kvpipe's cost.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.devices import engine_config
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import SamplingConfig
from kvpipe.engine import rollout, sglang
from kvpipe.pipeline.rollout import Request, seed_of

_PROMPTS, _SAMPLES, _TURNS = 32, 2, 5
_SAMPLING = SamplingConfig(max_new_tokens=16, temperature=1.0, ignore_eos=True, seed=0)
_SLOTS = {"max_running_requests": 16, "max_prefill_tokens": 256}


def measure() -> dict[str, float]:
    """Return the figures by key."""
    config = replace(engine_config(4096), dtype="float32", **_SLOTS)
    # The engine's front end reads the tokenizer after the start has returned.
    with tempfile.TemporaryDirectory() as directory:
        engine = sglang.start(config, ensure(TinyModel(), Path(directory)), 600.0)
        wall, cpu = _times(engine)
        engine.shut_down()
    tokens = _PROMPTS * _SAMPLES * _SAMPLING.max_new_tokens
    return {
        "rollout.kvpipe_tokens_per_second": tokens / statistics.median(wall["kvpipe"]),
        "rollout.bare_tokens_per_second": tokens / statistics.median(wall["bare"]),
        "rollout.kvpipe_over_bare": _over(wall),
        "rollout.kvpipe_over_bare_by_cpu_seconds": _over(cpu),
    }


def _times(engine: sglang.SglangEngine) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the wall and the CPU seconds of each turn, by way."""
    requests = _requests(engine)
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "kvpipe": lambda: _timed(lambda: rollout.roll_out(engine, requests, _SAMPLING)),
        "bare": lambda: _bare(engine, requests),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_TURNS + 1):
        # Alternate which of a pair is first.
        for name in sorted(ways, reverse=bool(turn % 2)):
            engine.flush()
            wall_s, cpu_s = ways[name]()
            if turn:  # the first turn compiles
                wall[name].append(wall_s)
                cpu[name].append(cpu_s)
    return wall, cpu


def _requests(engine: sglang.SglangEngine) -> list[Request]:
    encode = engine.engine.tokenizer_manager.tokenizer.encode
    return [
        Request(str(prompt), i, tuple(encode(f"{prompt} + 5 = ")), seed_of(0, str(prompt), i))
        for prompt in range(_PROMPTS)
        for i in range(_SAMPLES)
    ]


def _bare(engine: sglang.SglangEngine, requests: list[Request]) -> tuple[float, float]:
    """Generate for the requests with the engine as it ships; return wall and CPU seconds."""
    prompts = [list(request.prompt_ids) for request in requests]
    chosen = [sglang.parameters(_SAMPLING, request.seed or 0) for request in requests]

    def generate() -> Any:
        return engine.engine.generate(input_ids=prompts, sampling_params=chosen)

    with _without_hooks(engine):
        return _timed(lambda: engine.on_caller.call(generate))


@contextmanager
def _without_hooks(engine: sglang.SglangEngine) -> Iterator[None]:
    """Give the engine's objects their own methods back within the context."""
    client = engine.scheduler.tp_worker
    owners = (engine.scheduler, client, client.worker, engine.engine.tokenizer_manager)
    hooks = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if type(getattr(value, "__self__", None)).__module__.startswith("kvpipe.")
    ]
    for owner, name, _ in hooks:
        delattr(owner, name)
    try:
        yield
    finally:
        for owner, name, value in hooks:
            setattr(owner, name, value)


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall and the CPU seconds of the process that work takes."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def _over(seconds: dict[str, list[float]]) -> float:
    """Return the speed through kvpipe over the bare one: the median over the pairs of turns."""
    pairs = zip(seconds["bare"], seconds["kvpipe"], strict=True)
    return statistics.median(bare / ours for bare, ours in pairs)
