"""Drop, rebuild, offload and restore of a 1 GB KV pool, next to plain copies and fills of memory.

Each figure is the median of interleaved repetitions in one run: the machine is noisy, so only
ratios within one run are meaningful. Those of CPU seconds are of all threads of the process: a
restore makes zeros, places blocks and writes them in, each a pass over the bytes, on several threads.
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
    # The engine's front end reads the tokenizer after the start has returned.
    with tempfile.TemporaryDirectory() as directory:
        engine = sglang.start(engine_config(_TOKENS), ensure(TinyModel(), Path(directory)), 60.0)
        size, times = _times(engine)
        engine.shut_down()
    median, cpu = times.medians()
    return {
        "kv.pool_bytes": size,
        "kv.drop_seconds": median["drop"],
        "kv.rebuild_seconds": median["rebuild"],
        "kv.rebuild_over_memset": median["rebuild"] / median["memset"],
        "kv.rebuild_over_per_layer": median["rebuild"] / median["per_layer"],
        "kv.offload_over_copy": median["offload"] / median["copy"],
        "kv.restore_over_copy": median["restore"] / median["copy"],
        **{
            f"kv.{name}_cpu_over_copy": cpu[name] / cpu["copy"]
            for name in ("rebuild", "offload", "restore")
        },
        "kv.offload_gb_per_s": size / median["offload"] / 1e9,
        "kv.restore_gb_per_s": size / median["restore"] / 1e9,
    }


def _times(engine: sglang.SglangEngine) -> tuple[int, "Times"]:
    """Return the bytes of the KV cache, and the times of what is done with it."""
    size = sum(memory.bytes_of(kv_cache.buffers(engine)))
    times = Times()
    kv_cache.drop(engine)
    kv_cache.rebuild(engine)  # compiles
    for _ in range(_REPETITIONS):
        times.take("drop", lambda: kv_cache.drop(engine))
        times.take("memset", lambda: np.empty(size, np.uint8).fill(1))
        times.take("rebuild", lambda: kv_cache.rebuild(engine))
        times.take("per_layer", lambda: _per_layer(engine))
        source = np.ones(size, np.uint8)
        times.take("copy", source.copy)
        del source
        engine.on_scheduler.call(lambda: _offload_and_restore(engine, times))
    return size, times


class Times:
    """Seconds and CPU seconds of repeated work, by name."""

    def __init__(self) -> None:
        self._taken: dict[str, list[tuple[float, float]]] = {}

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work and return its result."""
        began, cpu = time.perf_counter(), time.process_time()
        result = work()
        took = time.perf_counter() - began, time.process_time() - cpu
        self._taken.setdefault(name, []).append(took)
        return result

    def medians(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the medians of the seconds and of the CPU seconds."""
        columns = {name: list(zip(*taken, strict=True)) for name, taken in self._taken.items()}
        seconds, cpu = (
            {name: statistics.median(column[k]) for name, column in columns.items()} for k in (0, 1)
        )
        return seconds, cpu


def _per_layer(engine: Any) -> None:
    """Create the pool's buffers as the engine does, layer by layer, and free them."""
    pool = engine.runner.token_to_kv_pool
    current = pool.kv_buffer
    pool._create_buffers()
    for buffer in jax.block_until_ready(pool.kv_buffer):
        buffer.delete()
    pool.kv_buffer = current


def _offload_and_restore(engine: Any, times: Times) -> None:
    """Take every token, offload and restore the whole pool, and return the tokens.

    In one call on the scheduler's thread, because the scheduler's loop checks for missing tokens.
    """
    allocator = engine.runner.token_to_kv_pool_allocator
    taken = allocator.alloc(allocator.available_size())
    _, kept = times.take("offload", lambda: kv_cache.offload_now(engine))
    times.take("restore", lambda: kv_cache.restore_now(engine, kept))
    allocator.free(taken)
