"""Drop the KV cache of a live engine, build it again, or put its contents aside meanwhile.

While the cache is away, each layer's place holds the ``jax.ShapeDtypeStruct`` of its buffer: the
cache keeps its own blueprint, and no second state can disagree with it. Everything here runs on the
scheduler's thread when the engine is idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvpipe.engine import memory
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import EngineError

KV = "kv"
# Rows that are copied at once. Fixed, so that copying any number of rows compiles one program.
_CHUNK_ROWS = 1024

Blueprint = tuple[jax.ShapeDtypeStruct, ...]
HostRows = list[np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class KvChange:
    """What a drop or a rebuild did.

    Attributes:
        fused_bytes_total: bytes of all layers over all devices, from the arrays' own shapes.
        fused_bytes_per_layer: bytes of one layer over all devices.
        layers: number of buffers; keys and values of a layer are fused in one.
        changed_bytes: change of the bytes in use over all devices, measured around it.
    """

    fused_bytes_total: int
    fused_bytes_per_layer: int
    layers: int
    changed_bytes: int


@dataclass(frozen=True)
class HostKv:
    """The used part of a KV cache, on the host.

    Attributes:
        rows: positions of the used tokens in each layer's buffer, int32 [used].
        layers: the rows of each layer, [used, ...] in the buffer's own dtype.
    """

    rows: np.ndarray[Any, np.dtype[np.int32]]
    layers: HostRows

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(layer.nbytes for layer in self.layers)


def buffers(engine: SglangEngine) -> list[jax.Array]:
    """Return the KV buffers that are on the devices; none while the cache is away."""
    return [b for b in engine.runner.token_to_kv_pool.kv_buffer if isinstance(b, jax.Array)]


def drop(engine: SglangEngine) -> KvChange:
    """Delete the KV buffers; until the rebuild every request is refused.

    Raises:
        EngineError: the cache is away already, tokens in it are still in use (no flush came
            before), or the engine stayed busy.
    """
    return engine.on_scheduler.call(lambda: _drop_unused(engine))


def rebuild(engine: SglangEngine) -> KvChange:
    """Make zeroed KV buffers in the places of the deleted ones and return when they exist.

    Raises:
        EngineError: the cache is there, or its contents wait to be restored.
    """
    return engine.on_scheduler.call(lambda: _rebuild_dropped(engine))


def offload(engine: SglangEngine) -> tuple[KvChange, HostKv]:
    """Copy the used part of the cache to the host and delete the buffers; no prefix is lost.

    Raises:
        EngineError: the cache is away already, or the engine stayed busy.
    """
    return engine.on_scheduler.call(lambda: _offload_now(engine))


def restore(engine: SglangEngine, kept: HostKv) -> KvChange:
    """Rebuild the cache and put what was offloaded back into its places.

    Args:
        engine: the engine that it was offloaded from.
        kept: what :func:`offload` returned; the prefix tree refers to its rows.

    Raises:
        EngineError: the cache is there, or was flushed meanwhile.
    """
    return engine.on_scheduler.call(lambda: _restore_now(engine, kept))


def used_rows(engine: SglangEngine) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the positions of all tokens that the allocator has given out, int32 [used].

    Position 0 (the first page) is the engine's own, for padding, and never counts.
    """
    allocator = engine.runner.token_to_kv_pool_allocator
    page_size = allocator.page_size
    if hasattr(allocator, "free_slots"):
        free = allocator.free_slots
    else:
        free = np.concatenate((allocator.free_pages, allocator.release_pages))
    pages = np.setdiff1d(np.arange(1, allocator.size // page_size + 1), free)
    return (pages[:, None] * page_size + np.arange(page_size)).ravel().astype(np.int32)


def _drop_unused(engine: SglangEngine) -> KvChange:
    _needs_kv(engine)
    if used := len(used_rows(engine)):
        raise EngineError(f"{used} tokens of the KV cache are in use; flush it before the drop")
    return _delete(engine, "its KV cache is dropped; rebuild it first")


def _offload_now(engine: SglangEngine) -> tuple[KvChange, HostKv]:
    _needs_kv(engine)
    rows = used_rows(engine)
    kept = HostKv(rows, _gather(engine.runner.token_to_kv_pool.kv_buffer, rows))
    return _delete(engine, "its KV cache is offloaded; restore it first"), kept


def _rebuild_dropped(engine: SglangEngine) -> KvChange:
    if used := len(used_rows(engine)):
        raise EngineError(
            f"{used} tokens of the offloaded KV cache wait to be restored; restore them, or flush"
        )
    return _allocate(engine)


def _restore_now(engine: SglangEngine, kept: HostKv) -> KvChange:
    if not np.array_equal(used_rows(engine), kept.rows):
        raise EngineError("the cache was flushed after it was offloaded; rebuild it instead")
    change = _allocate(engine)
    pool = engine.runner.token_to_kv_pool
    pool.kv_buffer[:] = _scatter(pool.kv_buffer, kept)
    return change


def _needs_kv(engine: SglangEngine) -> None:
    if KV in engine.away:
        raise EngineError(f"the KV cache is not there: {engine.away[KV]}")


def _delete(engine: SglangEngine, why: str) -> KvChange:
    engine.away[KV] = why
    pool = engine.runner.token_to_kv_pool
    before = sum(memory.bytes_in_use())
    blueprint = tuple(
        jax.ShapeDtypeStruct(buffer.shape, buffer.dtype, sharding=buffer.sharding)
        for buffer in pool.kv_buffer
    )
    for buffer in pool.kv_buffer:
        buffer.delete()
    pool.kv_buffer[:] = blueprint
    return _change(blueprint, sum(memory.bytes_in_use()) - before)


def _allocate(engine: SglangEngine) -> KvChange:
    if KV not in engine.away:
        raise EngineError("the KV cache is there: only one that is away can be made again")
    pool = engine.runner.token_to_kv_pool
    before = sum(memory.bytes_in_use())
    blueprint = tuple(pool.kv_buffer)
    pool.kv_buffer[:] = jax.block_until_ready(_allocator(blueprint)())
    del engine.away[KV]
    return _change(blueprint, sum(memory.bytes_in_use()) - before)


@lru_cache(maxsize=4)
def _allocator(blueprint: Blueprint) -> Any:
    """Return the function that makes all layers at once: compiled once, not once a layer.

    Allocating layer by layer compiles again for each; on a TPU that takes minutes.
    """

    def zeros() -> list[jax.Array]:
        return [jnp.zeros(layer.shape, layer.dtype) for layer in blueprint]

    return jax.jit(zeros, out_shardings=[layer.sharding for layer in blueprint])


@jax.jit
def _take(layers: Sequence[jax.Array], rows: jax.Array) -> list[jax.Array]:
    return [layer.at[rows].get(mode="clip") for layer in layers]


@lru_cache(maxsize=4)
def _putter(shardings: tuple[Any, ...]) -> Any:
    """Return the function that writes rows into the layers in place; padding rows are dropped."""

    def put(
        layers: Sequence[jax.Array], rows: jax.Array, values: Sequence[jax.Array]
    ) -> list[jax.Array]:
        pairs = zip(layers, values, strict=True)
        return [layer.at[rows].set(value, mode="drop") for layer, value in pairs]

    return jax.jit(put, donate_argnums=0, out_shardings=list(shardings))


def _gather(layers: Sequence[jax.Array], rows: np.ndarray[Any, Any]) -> HostRows:
    """Return ``rows`` of each layer on the host, copied in chunks of one size."""
    out = [np.empty((len(rows), *layer.shape[1:]), layer.dtype) for layer in layers]
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = rows[start : start + _CHUNK_ROWS]
        taken = _take(list(layers), _padded(chunk, fill=0))
        for host, device in zip(out, taken, strict=True):
            host[start : start + len(chunk)] = np.asarray(device)[: len(chunk)]
    return out


def _scatter(layers: Sequence[jax.Array], kept: HostKv) -> list[jax.Array]:
    """Return the layers with the kept rows written into them; the old buffers are reused."""
    put = _putter(tuple(layer.sharding for layer in layers))
    current = list(layers)
    for start in range(0, len(kept.rows), _CHUNK_ROWS):
        chunk = kept.rows[start : start + _CHUNK_ROWS]
        rows = _padded(chunk, fill=current[0].shape[0])
        values = [_padded(host[start : start + len(chunk)], fill=0) for host in kept.layers]
        current = put(current, rows, values)
    return jax.block_until_ready(current)


def _padded(chunk: np.ndarray[Any, Any], fill: int) -> np.ndarray[Any, Any]:
    """Return ``chunk`` with its first axis filled up to the size of a chunk."""
    padding = [(0, _CHUNK_ROWS - len(chunk)), *[(0, 0)] * (chunk.ndim - 1)]
    return np.pad(chunk, padding, constant_values=fill)


def _change(blueprint: Blueprint, changed_bytes: int) -> KvChange:
    sizes = [sum(memory.bytes_of([layer])) for layer in blueprint]
    return KvChange(sum(sizes), sizes[0], len(sizes), changed_bytes)
