"""A start without weights, and the peak of one with random weights, on the real engine."""

from pathlib import Path
from typing import Any

import pytest

from kvpipe.checkpoints.safetensors import Tensors
from kvpipe.errors import EngineError
from kvpipe.system.process_memory import process_memory
from tests.conftest import IDLE_TIMEOUT_S, StartEngine, engine_config, greedy
from tests.golden.answers import comparable, golden


def test_an_engine_that_starts_empty_never_holds_a_weight_refuses_and_then_gives_the_ids_of_transformers(
    four_devices: None, tiny_dir: Path, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import empty_start, kv_cache, memory, shapes, weights
    from kvpipe.engine.params import ParamTable
    from kvpipe.engine.peaks import PeakSampler

    config, answer = engine_config(dtype="float32"), golden("tiny_float32")["answers"][0]
    planned = shapes.of_devices_here(config, tiny_dir).params
    memory.collect_garbage()
    before = memory.used_now()
    with PeakSampler(lambda: True) as sampler:
        sampler.begin(None)
        engine = empty_start.start(config, tiny_dir, IDLE_TIMEOUT_S)
        peak = sampler.take(process_memory())
    try:
        held = [most - was for most, was in zip(peak.bytes_in_use, before, strict=True)]
        kv_bytes = kv_cache.nbytes(engine) // len(before)
        assert all(kv_bytes <= more < kv_bytes + 1024 for more in held)  # the rest is random keys
        assert ParamTable(engine).blueprint == planned
        for act in (lambda: engine.generate("Hello", greedy(1)), lambda: weights.offload(engine)):
            with pytest.raises(EngineError, match="it has no weights yet; stream or swap some in"):
                act()
        change = weights.stream(engine, tiny_weights)
        assert change.changed_bytes == change.nbytes == sum(memory.bytes_of(planned.values()))
        assert engine.proof.proven
        assert not engine.proof.wrong
        expected = comparable(answer)[:32]
        assert list(engine.generate(answer["prompt"], greedy(32)).token_ids) == expected
    finally:
        engine.shut_down()


def test_a_start_with_random_weights_peaks_at_the_planned_bytes(
    start_engine: StartEngine, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy that the engine's loader makes goes through one of two functions of jax."""
    import jax
    import jax.numpy as jnp

    from kvpipe.engine import memory, shapes

    planned = memory.bytes_of(shapes.of_devices_here(engine_config(), tiny_dir).dummy_start)
    memory.collect_garbage()
    before, held = memory.used_now(), []

    def watched(function: Any) -> Any:
        def copy(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            held.append(memory.used_now()[0] - before[0])
            return made

        return copy

    monkeypatch.setattr(
        jax.lax, "with_sharding_constraint", watched(jax.lax.with_sharding_constraint)
    )
    monkeypatch.setattr(jnp, "asarray", watched(jnp.asarray))
    with start_engine(tiny_dir):
        pass
    assert 0 <= max(held) - planned[0] < 64  # random keys
