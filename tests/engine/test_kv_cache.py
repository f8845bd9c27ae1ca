"""Drop and rebuild on a live engine: exact bytes, the same ids, no second compilation, no crash."""

from typing import Any

import pytest

from kvpipe.errors import EngineError
from tests.conftest import greedy

pytestmark = pytest.mark.slow


def test_three_drops_and_rebuilds_give_back_the_same_bytes_and_the_same_ids(
    real_engine: Any,
) -> None:
    from kvpipe.engine import kv_cache, memory
    from kvpipe.engine.compile_count import CompileCounter

    kv_bytes = sum(memory.bytes_of(kv_cache.buffers(real_engine)))
    assert kv_bytes == 3 * (1024 + 1) * 2 * 4 * 128 * 2
    first = real_engine.generate("Hello", greedy(16))
    compilations = CompileCounter()
    for cycle in range(3):
        real_engine.flush()
        with_kv = sum(memory.bytes_in_use())
        compilations.take()
        dropped = kv_cache.drop(real_engine)
        assert (dropped.fused_bytes_total, dropped.layers) == (kv_bytes, 3)
        assert dropped.fused_bytes_per_layer * 3 == kv_bytes
        assert -dropped.changed_bytes == kv_bytes == with_kv - sum(memory.bytes_in_use())
        assert kv_cache.buffers(real_engine) == []
        rebuilt = kv_cache.rebuild(real_engine)
        assert rebuilt.changed_bytes == rebuilt.fused_bytes_total == kv_bytes
        assert sum(memory.bytes_in_use()) == with_kv
        assert real_engine.generate("Hello", greedy(16)).token_ids == first.token_ids
        assert cycle == 0 or compilations.take().count == 0


def test_a_second_drop_and_a_rebuild_of_what_is_there_are_refused(real_engine: Any) -> None:
    from kvpipe.engine import kv_cache

    with pytest.raises(EngineError, match="the KV cache is there"):
        kv_cache.rebuild(real_engine)
    kv_cache.drop(real_engine)
    with pytest.raises(EngineError, match="dropped already"):
        kv_cache.drop(real_engine)


def test_a_generate_while_the_cache_is_dropped_raises_and_the_engine_lives_on(
    real_engine: Any,
) -> None:
    from kvpipe.engine import kv_cache

    kv_cache.drop(real_engine)
    with pytest.raises(EngineError, match="cannot generate: its KV cache is dropped"):
        real_engine.generate("Hello", greedy(4))
    with pytest.raises(EngineError, match="cannot generate: its KV cache is dropped"):
        real_engine.on_caller.call(lambda: real_engine.engine.generate(prompt="Hello"))
    kv_cache.rebuild(real_engine)
    assert len(real_engine.generate("Hello", greedy(4)).token_ids) == 4


def test_a_flush_empties_the_prefix_cache_and_without_one_it_is_used(real_engine: Any) -> None:
    prompt = "The KV cache is dropped and rebuilt."
    first = real_engine.generate(prompt, greedy(4))
    again = real_engine.generate(prompt, greedy(4))
    flushed = real_engine.flush()
    after_flush = real_engine.generate(prompt, greedy(4))
    cached = [o.raw["meta_info"]["cached_tokens"] for o in (first, again, after_flush)]
    assert cached[0] == 0 < cached[1]
    assert cached[2] == 0
    assert flushed["flushed_tokens"] > 0
    assert flushed["free_tokens"] == 1024


def test_a_flush_right_after_a_generate_finds_no_leak(real_engine: Any) -> None:
    """Without waiting, the overlapped last step makes the scheduler's own leak check fail."""
    for length in range(1, 8):
        real_engine.generate("Hello", greedy(length))
        real_engine.flush()
    assert len(real_engine.generate("Hello", greedy(3)).token_ids) == 3


def test_the_ledger_attributes_every_live_byte_to_one_pool(real_engine: Any) -> None:
    from kvpipe.engine import kv_cache, memory, weights

    params = weights.parameters(real_engine)
    extra = {path: array + 0 for path, array in params.items()}
    ledger = memory.measure(
        params=params.values(),
        kv=kv_cache.buffers(real_engine),
        slots={"shared": params.values(), "own": extra.values()},
    )
    set_bytes = memory.bytes_of(params.values())
    assert ledger.of("params") == ledger.of("slot:own") == set_bytes
    assert ledger.sum_of("slot:shared") == 0
    assert ledger.total_bytes == sum(memory.bytes_in_use())


def test_measuring_twice_finds_the_same_bytes(real_engine: Any) -> None:
    """Materialising shards while summing would make arrays that the next sum counts."""
    from kvpipe.engine import memory

    assert memory.bytes_in_use() == memory.bytes_in_use()
