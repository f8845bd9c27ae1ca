"""Drop and rebuild on a live engine: exact bytes, the same ids, no second compilation, no crash."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.errors import EngineError, InputError
from tests.conftest import IDLE_TIMEOUT_S, StartEngine, busy, greedy


def test_three_drops_and_rebuilds_give_back_the_same_bytes_and_the_same_ids(
    real_engine: Any,
) -> None:
    from kvpipe.engine import kv_cache, memory
    from kvpipe.engine.compile_count import CompileCounter

    kv_bytes = sum(memory.bytes_of(kv_cache.buffers(real_engine)))
    assert kv_bytes == 3 * (1024 + 1) * 2 * 4 * 128 * 2
    first = real_engine.generate("Hello", greedy(8))
    compilations = CompileCounter()
    for cycle in range(3):
        real_engine.flush()
        with_kv = sum(memory.bytes_in_use())
        compilations.take()
        dropped = kv_cache.drop(real_engine)
        assert (dropped.nbytes, dropped.fields["deleted_buffers"]) == (kv_bytes, 3)
        assert dropped.fields["fused_bytes_per_layer"] * 3 == kv_bytes
        assert dropped.freed_bytes == kv_bytes == with_kv - sum(memory.bytes_in_use())
        assert kv_cache.buffers(real_engine) == []
        rebuilt = kv_cache.rebuild(real_engine)
        assert rebuilt.changed_bytes == rebuilt.nbytes == kv_bytes
        assert sum(memory.bytes_in_use()) == with_kv
        assert real_engine.generate("Hello", greedy(8)).token_ids == first.token_ids
        assert cycle == 0 or compilations.take().programs == 0


def test_a_second_drop_and_a_rebuild_of_what_is_there_are_refused(real_engine: Any) -> None:
    from kvpipe.engine import kv_cache

    with pytest.raises(EngineError, match="the KV cache is there"):
        kv_cache.rebuild(real_engine)
    kv_cache.drop(real_engine)
    with pytest.raises(EngineError, match="the KV cache is not there: its KV cache is dropped"):
        kv_cache.drop(real_engine)


@pytest.fixture
def rebuilt(real_engine: Any) -> Callable[[int], Any]:
    """A function that drops the cache and rebuilds it to a capacity; its bytes are checked."""
    from kvpipe.engine import kv_cache, memory

    def rebuild(tokens: int) -> None:
        real_engine.flush()
        kv_cache.drop(real_engine)
        change = kv_cache.rebuild(real_engine, tokens)
        assert change.changed_bytes == change.nbytes == 3 * (tokens + 1) * 2 * 4 * 128 * 2
        assert sum(memory.bytes_of(kv_cache.buffers(real_engine))) == change.nbytes
        assert real_engine.max_total_tokens == tokens
        assert real_engine.flush()["free_tokens"] == tokens

    return rebuild


@pytest.mark.nightly(finds="an allocator that is off after the way back")
def test_a_cache_can_be_rebuilt_to_another_capacity_and_back(
    real_engine: Any, rebuilt: Callable[[int], Any]
) -> None:
    """The engine ends requests that are longer than a smaller cache, and nothing waits for them."""
    from kvpipe.engine.compile_count import CompileCounter

    first = real_engine.generate("Hello", greedy(30)).token_ids
    assert len(first) == 30
    rebuilt(20)
    ended = real_engine.generate("Hello", greedy(30)).token_ids
    assert 10 < len(ended) < 20
    assert ended == first[: len(ended)]
    rebuilt(3000)
    rebuilt(1024)
    compilations = CompileCounter()
    compilations.take()
    assert real_engine.generate("Hello", greedy(30)).token_ids == first
    assert compilations.take().programs == 0  # the first capacity's programs are still there


def test_a_capacity_that_holds_no_request_is_refused_and_the_cache_can_be_rebuilt(
    real_engine: Any,
) -> None:
    from kvpipe.engine import kv_cache

    kv_cache.drop(real_engine)
    for tokens, error, message in [
        (6, EngineError, "6 tokens hold no request; it must be at least 7"),
        (0, InputError, "max_total_tokens is 0, it must be at least a page of 1 token"),
    ]:
        with pytest.raises(error, match=message):
            kv_cache.rebuild(real_engine, tokens)
    kv_cache.rebuild(real_engine)
    assert len(real_engine.generate("Hello", greedy(2)).token_ids) == 2


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
    cached = [output.cached_tokens for output in (first, again, after_flush)]
    assert cached[0] == 0 < cached[1]
    assert cached[2] == 0
    assert flushed["flushed_tokens"] > 0
    assert flushed["free_tokens"] == 1024
    digest = real_engine.proof.whole
    assert [output.cache_digests for output in (first, again, after_flush)] == [(), (digest,), ()]
    assert {output.weights_digest for output in (first, again, after_flush)} == {digest}
    assert all(output.forward_steps >= 4 and not output.stopped for output in (first, again))


def test_a_flush_right_after_a_generate_finds_no_leak(real_engine: Any) -> None:
    """Without waiting, the overlapped last step makes the scheduler's own leak check fail."""
    for length in range(1, 8):
        real_engine.generate("Hello", greedy(length))
        real_engine.flush()
    assert len(real_engine.generate("Hello", greedy(3)).token_ids) == 3


def test_every_live_byte_belongs_to_one_pool(real_engine: Any) -> None:
    from kvpipe.engine import kv_cache, memory, weights

    params = weights.parameters(real_engine)
    extra = {path: array + 0 for path, array in params.items()}
    ledger, _ = memory.measure(
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


def test_an_offloaded_cache_comes_back_with_its_prefixes_and_the_same_ids(
    real_engine: Any, tiny_weights: Any
) -> None:
    from kvpipe.engine import kv_cache, memory, weights

    prompt = "The KV cache is dropped and rebuilt."
    first = real_engine.generate(prompt, greedy(8))
    without = real_engine.generate(prompt, greedy(8))
    with_kv = memory.bytes_in_use()
    dropped, kept = kv_cache.offload(real_engine)
    assert -dropped.changed_bytes == dropped.nbytes
    assert 0 < kept.nbytes <= dropped.nbytes
    second_set = weights.build(real_engine, tiny_weights)
    for array in second_set.values():
        array.delete()
    restored = kv_cache.restore(real_engine, kept)
    assert restored.changed_bytes == restored.nbytes
    assert memory.bytes_in_use() == with_kv
    after = real_engine.generate(prompt, greedy(8))
    assert after.token_ids == without.token_ids == first.token_ids
    assert after.cached_tokens == without.cached_tokens > 0 == first.cached_tokens


def test_more_tokens_than_one_block_survive_an_offload(
    real_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine import kv_cache

    monkeypatch.setattr(kv_cache, "_BLOCK_ROWS", 4)
    first = real_engine.generate("one", greedy(8))
    real_engine.generate("two and", greedy(8))
    dropped, kept = kv_cache.offload(real_engine)
    assert len(kept.starts) >= 3
    assert kept.nbytes == dropped.nbytes * 4 * len(kept.starts) // 1025
    kv_cache.restore(real_engine, kept)
    again = real_engine.generate("one", greedy(8))
    assert again.cached_tokens > 0
    assert again.token_ids == first.token_ids


def test_what_is_offloaded_can_be_neither_dropped_nor_rebuilt_nor_restored_after_a_flush(
    real_engine: Any,
) -> None:
    from kvpipe.engine import kv_cache

    real_engine.generate("Hello", greedy(4))
    _, kept = kv_cache.offload(real_engine)
    for refused, message in [
        (kv_cache.drop, "its KV cache is offloaded"),
        (kv_cache.offload, "its KV cache is offloaded"),
        (kv_cache.rebuild, "tokens of the offloaded KV cache wait to be restored"),
    ]:
        with pytest.raises(EngineError, match=message):
            refused(real_engine)
    with pytest.raises(EngineError, match="cannot generate: its KV cache is offloaded"):
        real_engine.generate("Hello", greedy(4))
    real_engine.flush()
    with pytest.raises(EngineError, match="flushed after it was offloaded"):
        kv_cache.restore(real_engine, kept)
    kv_cache.rebuild(real_engine)


def test_a_drop_without_a_flush_is_refused_and_a_drop_of_a_busy_engine_waits(
    real_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine import kv_cache

    real_engine.generate("Hello", greedy(4))
    with pytest.raises(EngineError, match="tokens of the KV cache are in use; flush it before"):
        kv_cache.drop(real_engine)
    real_engine.flush()
    with busy(real_engine) as go_on, ThreadPoolExecutor(1) as thread:
        with monkeypatch.context() as patch:
            patch.setattr(real_engine.on_scheduler, "_idle_timeout_s", 0.0)
            with pytest.raises(EngineError, match="the engine was still busy after 0 s"):
                kv_cache.drop(real_engine)
        waiting = thread.submit(kv_cache.drop, real_engine)
        assert not waiting.done()
        go_on()
        with pytest.raises(EngineError, match="in use; flush it"):
            waiting.result()


def test_the_host_gets_its_memory_back_when_a_large_pool_is_dropped(
    start_engine: StartEngine, tiny_dir: Path
) -> None:
    """Without malloc_trim the resident set hardly falls."""
    from kvpipe.engine import kv_cache, memory
    from kvpipe.system.process_memory import process_memory

    with start_engine(tiny_dir, max_total_tokens=180_000) as engine:
        pool = sum(memory.bytes_of(kv_cache.buffers(engine)))
        assert pool > 10**9
        memory.bytes_in_use()  # waits until the engine's own zeros are written
        before = process_memory().process_rss_bytes
        kv_cache.drop(engine)
        assert before - process_memory().process_rss_bytes >= 0.95 * pool


@contextmanager
def another_thread_collecting() -> Iterator[Callable[[], None]]:
    """Keep a collection of another thread from ending; gives what lets it, as the end does."""

    class Slow:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            going.set()
            end.wait(IDLE_TIMEOUT_S)

    going, end = threading.Event(), threading.Event()
    Slow()
    other = threading.Thread(target=gc.collect)
    other.start()
    try:
        assert going.wait(IDLE_TIMEOUT_S)
        yield end.set
    finally:
        end.set()
        other.join()


def test_garbage_is_not_counted_while_another_thread_is_collecting(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``gc.collect`` alone does nothing then, as when jax frees an array on the engine's thread."""
    import jax.numpy as jnp

    from kvpipe.engine import memory

    found: list[int] = []
    before = memory.bytes_in_use()
    with another_thread_collecting() as let_it_end:

        def collect() -> int:
            found.append(gc.collect())
            let_it_end()
            return found[-1]

        cycle: list[Any] = [jnp.zeros(1000)]
        cycle.append(cycle)
        del cycle
        monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=collect, callbacks=gc.callbacks))
        assert memory.bytes_in_use() == before
    assert (found[0], len(found) > 1) == (0, True)


def test_a_collection_that_does_not_end_is_reported_and_not_waited_for(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine import memory

    monkeypatch.setattr(memory, "_LONGEST_COLLECTION_S", 0.1)
    with (
        another_thread_collecting(),
        pytest.raises(EngineError, match=r"for 0\.1 s another thread has been collecting garbage"),
    ):
        memory.collect_garbage()


@pytest.mark.nightly(finds="memory of the host that each cycle keeps a little of")
def test_a_hundred_cycles_drift_by_no_byte_and_no_token(real_engine: Any) -> None:
    from kvpipe.engine import kv_cache, memory
    from kvpipe.engine.compile_count import CompileCounter
    from kvpipe.system.process_memory import process_memory

    compilations = CompileCounter()
    seen, in_use, resident = set(), set(), []
    for cycle in range(100):
        seen.add(real_engine.generate("Hello", greedy(3)).token_ids)
        real_engine.flush()
        kv_cache.drop(real_engine)
        kv_cache.rebuild(real_engine)
        if cycle == 0:
            compilations.take()
        in_use.add(memory.bytes_in_use())
        resident.append(process_memory().process_rss_bytes)
    assert len(seen) == 1, seen
    assert len(in_use) == 1, in_use
    assert compilations.take().programs == 0
    drift = resident[-1] - resident[9]
    assert drift < 32 * 2**20


def test_blocks_hold_every_used_row_and_stay_inside_the_buffer(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from kvpipe.engine import kv_cache

    monkeypatch.setattr(kv_cache, "_BLOCK_ROWS", 4)
    for total in range(1, 12):
        for first in range(total):
            rows = np.arange(first, total, 2, dtype=np.int32)
            starts = kv_cache._block_starts(rows, total)
            size = kv_cache._block_rows(total)
            assert all(0 <= start <= total - size for start in starts)
            held = {row for start in starts for row in range(start, start + size)}
            assert set(rows.tolist()) <= held


def test_whole_pages_are_offloaded_and_rebuilt(
    start_engine: StartEngine, model_cache: Path
) -> None:
    """In a model of one layer: pages of 16 tokens take programs of their own."""
    from kvpipe.engine import kv_cache

    one_layer = ensure(TinyModel(num_hidden_layers=1), model_cache)
    with start_engine(one_layer, page_size=16, max_total_tokens=496) as engine:
        prompt = "The KV cache is dropped and rebuilt, page by page."
        first = engine.generate(prompt, greedy(8))
        without = engine.generate(prompt, greedy(8))
        dropped, kept = kv_cache.offload(engine)
        assert len(kept.rows) % 16 == 0 < len(kept.rows)
        assert kept.nbytes <= dropped.nbytes
        kv_cache.restore(engine, kept)
        again = engine.generate(prompt, greedy(8))
        assert again.token_ids == without.token_ids
        assert again.cached_tokens == without.cached_tokens >= 16
        for asked, whole in ((1030, 1024), (500, 496)):
            engine.flush()
            kv_cache.drop(engine)
            change = kv_cache.rebuild(engine, asked)
            assert change.changed_bytes == (whole + 16) * 2 * 4 * 128 * 2
            assert engine.flush()["free_tokens"] == whole
        assert engine.generate(prompt, greedy(8)).token_ids == first.token_ids
