"""Drop, rebuild, offload and restore of a 1 GB KV pool, next to plain copies and fills of memory.

Each figure is the median of interleaved repetitions in one run: the machine is noisy, so only
ratios within one run are meaningful.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.devices import engine_config
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.engine import kv_cache, memory, sglang

_TOKENS = 360_000
_REPETITIONS = 5


def measure() -> dict[str, float]:
    """Return the figures of the KV cache by key."""
    with tempfile.TemporaryDirectory() as directory:
        engine = sglang.start(engine_config(_TOKENS), ensure(TinyModel(), Path(directory)), 60.0)
    size = sum(memory.bytes_of(kv_cache.buffers(engine)))
    times: dict[str, list[float]] = {}
    kv_cache.drop(engine)
    kv_cache.rebuild(engine)  # compiles
    for _ in range(_REPETITIONS):
        _time(times, "drop", lambda: kv_cache.drop(engine))
        _time(times, "memset", lambda: np.empty(size, np.uint8).fill(1))
        _time(times, "rebuild", lambda: kv_cache.rebuild(engine))
        _time(times, "per_layer", lambda: _per_layer(engine))
        source = np.ones(size, np.uint8)
        _time(times, "copy", source.copy)
        del source
        engine.on_scheduler.call(lambda: _offload_and_restore(engine, times))
    engine.shut_down()
    median = {name: statistics.median(values) for name, values in times.items()}
    offload_over_copy = median["offload"] / median["copy"]
    return {
        "kv.pool_bytes": size,
        "kv.drop_seconds": median["drop"],
        "kv.rebuild_seconds": median["rebuild"],
        "kv.rebuild_over_memset": median["rebuild"] / median["memset"],
        "kv.rebuild_over_per_layer": median["rebuild"] / median["per_layer"],
        "kv.offload_over_copy": offload_over_copy,
        "kv.restore_over_copy": median["restore"] / median["copy"],
        "kv.offload_gb_per_s": size / median["offload"] / 1e9,
        "kv.restore_gb_per_s": size / median["restore"] / 1e9,
    }


def _time(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> None:
    began = time.perf_counter()
    work()
    times.setdefault(name, []).append(time.perf_counter() - began)


def _per_layer(engine: Any) -> None:
    """Create the pool's buffers as the engine does, layer by layer, and free them."""
    pool = engine.runner.token_to_kv_pool
    current = pool.kv_buffer
    pool._create_buffers()
    for buffer in jax.block_until_ready(pool.kv_buffer):
        buffer.delete()
    pool.kv_buffer = current


def _offload_and_restore(engine: Any, times: dict[str, list[float]]) -> None:
    """Take every token, offload and restore the whole pool, and return the tokens.

    In one call on the scheduler's thread, because the scheduler's loop checks for missing tokens.
    """
    allocator = engine.runner.token_to_kv_pool_allocator
    taken = allocator.alloc(allocator.available_size())
    began = time.perf_counter()
    _, kept = kv_cache.offload_now(engine)
    offloaded = time.perf_counter()
    kv_cache.restore_now(engine, kept)
    times.setdefault("offload", []).append(offloaded - began)
    times.setdefault("restore", []).append(time.perf_counter() - offloaded)
    allocator.free(taken)
