"""Drop the KV cache of a live engine, rebuild it, or offload its contents.

While its buffers are deleted, each layer's place holds the ``jax.ShapeDtypeStruct`` of its buffer: the
cache keeps its own blueprint, and no second state can disagree with it. Everything here runs on the
scheduler's thread when the engine is idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvpipe.engine import memory, peaks, transfer
from kvpipe.engine.kv_capacity import resize
from kvpipe.engine.params import as_shape
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import EngineError
from kvpipe.pipeline.ledger import KV_PUT, KV_TAKE, KV_ZEROS, Change

KV = "kv"
# Rows that are copied at once: whole blocks that hold a used row, so that copying any number of them
# compiles one program and each copy is one run of memory.
_BLOCK_ROWS = 1024
# At HEAD a buffer is [page, token in page, heads, keys and values, head_dim], before [token, ...].
_NDIM_OF_HEAD = 5

Blueprint = Sequence[jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class HostKv:
    """The used part of a KV cache, on the host.

    Attributes:
        rows: positions of the used tokens in the cache, int32 [used].
        starts: where each kept block begins in a layer's buffer.
        blocks: for each start, the block of each layer as unsigned integers of the dtype's width.
        held_tokens: number of the used tokens that lie in these blocks.
    """

    rows: np.ndarray[Any, np.dtype[np.int32]]
    starts: list[int]
    blocks: list[list[transfer.HostShards]]
    held_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes over all hosts; every host must read it at the same point."""
        return transfer.host_bytes(layer for block in self.blocks for layer in block)


def buffers(engine: SglangEngine) -> list[jax.Array]:
    """Return the KV buffers that are on the devices; none while they are deleted."""
    return [b for b in engine.runner.token_to_kv_pool.kv_buffer if isinstance(b, jax.Array)]


def nbytes(engine: SglangEngine) -> int:
    """Return the bytes of the KV cache, also while its buffers are deleted, as they are counted."""
    return memory.counted(engine.runner.token_to_kv_pool.kv_buffer)


def drop(engine: SglangEngine) -> Change:
    """Delete the KV buffers; until the rebuild every request is refused.

    Raises:
        EngineError: the cache is dropped or offloaded already, tokens in it are still in use (no flush came
            before), or the engine stayed busy.
    """
    change = engine.on_scheduler.call(lambda: _drop_unused(engine))
    memory.give_back_host_memory()
    return change


def rebuild(engine: SglangEngine, max_total_tokens: int | None = None) -> Change:
    """Make zeroed KV buffers in the places of the deleted ones and return when they exist.

    ``max_total_tokens`` is the cache's capacity from now on; None is the one that it had. Another
    one lets XLA compile the engine's steps again, since the cache is one of their arguments.

    Raises:
        EngineError: the cache is there, its contents wait to be restored, or the capacity is too
            small for a request.
        InputError: the capacity is less than a page.
    """
    change = engine.on_scheduler.call(lambda: _rebuild_dropped(engine, max_total_tokens))
    return change.with_fields(max_total_tokens=engine.max_total_tokens)


def offload(engine: SglangEngine) -> tuple[Change, HostKv]:
    """Copy the used part of the cache to the host and delete the buffers; no prefix is lost.

    Raises:
        EngineError: the cache is dropped or offloaded already, or the engine stayed busy.
    """
    change, kept = engine.on_scheduler.call(lambda: offload_now(engine))
    memory.give_back_host_memory()
    sizes = {"offloaded_tokens": len(kept.rows), "offloaded_bytes": kept.nbytes}
    return change.with_fields(**sizes), kept


def restore(engine: SglangEngine, kept: HostKv) -> Change:
    """Rebuild the cache and put what :func:`offload` returned back into its places.

    Raises:
        EngineError: the cache is there, or was flushed meanwhile.
    """
    change = engine.on_scheduler.call(lambda: restore_now(engine, kept))
    sizes = {"restored_tokens": len(kept.rows), "restored_bytes": kept.nbytes}
    return change.with_fields(**sizes)


def used_rows(engine: SglangEngine) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the positions of all tokens that the allocator has given out, int32 [used].

    Position 0 (the first page) is the engine's own, for padding, and never counts.
    """
    allocator = engine.runner.token_to_kv_pool_allocator
    page_size = allocator.page_size
    if hasattr(allocator, "free_slots"):
        free = [allocator.free_slots]
    else:
        free = [allocator.free_pages, allocator.release_pages]
    # HEAD keeps a list for each data-parallel rank, the others one array.
    free = np.concatenate([np.concatenate(np.atleast_2d(pages)) for pages in free])
    pages = np.setdiff1d(np.arange(1, allocator.size // page_size + 1), free)
    return (pages[:, None] * page_size + np.arange(page_size)).ravel().astype(np.int32)


def holds_used_rows(engine: SglangEngine, kept: HostKv) -> bool:
    """Whether the tokens that are in use now are those that were offloaded: no flush has freed them."""
    return np.array_equal(used_rows(engine), kept.rows)


def _drop_unused(engine: SglangEngine) -> Change:
    needs_kv(engine)
    if used := len(used_rows(engine)):
        raise EngineError(f"{used} tokens of the KV cache are in use; flush it before the drop")
    return _delete(engine, "its KV cache is dropped; rebuild it first")


def offload_now(engine: SglangEngine) -> tuple[Change, HostKv]:
    """Offload at once; for the scheduler's own thread, when the engine is idle."""
    needs_kv(engine)
    tokens = used_rows(engine)
    layers = engine.runner.token_to_kv_pool.kv_buffer
    rows, total = tokens // _tokens_per_row(layers[0]), layers[0].shape[0]
    starts = _block_starts(rows, total)
    kept = HostKv(tokens, starts, _copy_out(layers, starts), _held(rows, starts, total))
    return _delete(engine, "its KV cache is offloaded; restore it first"), kept


def _rebuild_dropped(engine: SglangEngine, max_total_tokens: int | None) -> Change:
    _needs_kv_away(engine)
    if used := len(used_rows(engine)):
        raise EngineError(
            f"{used} tokens of the offloaded KV cache wait to be restored; restore them, or flush"
        )
    if max_total_tokens not in (None, engine.max_total_tokens):
        resize(engine, max_total_tokens)
    return _allocate(engine)


def restore_now(engine: SglangEngine, kept: HostKv) -> Change:
    """Restore at once; for the scheduler's own thread, when the engine is idle."""
    if not holds_used_rows(engine, kept):
        raise EngineError("the cache was flushed after it was offloaded; rebuild it instead")
    _needs_kv_away(engine)
    change = _allocate(engine)
    pool = engine.runner.token_to_kv_pool
    pool.kv_buffer[:] = _copy_in(pool.kv_buffer, kept)
    return change


def needs_kv(engine: SglangEngine) -> None:
    """Raise an EngineError unless the KV cache is on the devices."""
    if KV in engine.unavailable:
        raise EngineError(f"the KV cache is not there: {engine.unavailable[KV]}")


def _delete(engine: SglangEngine, why: str) -> Change:
    engine.unavailable[KV] = why
    pool = engine.runner.token_to_kv_pool
    before = memory.total_in_use()
    blueprint = tuple(as_shape(buffer) for buffer in pool.kv_buffer)
    for buffer in pool.kv_buffer:
        buffer.delete()
    pool.kv_buffer[:] = blueprint
    change = _change(blueprint, memory.total_in_use() - before)
    return change.with_fields(deleted_buffers=len(blueprint), freed_bytes=change.freed_bytes)


def _needs_kv_away(engine: SglangEngine) -> None:
    if KV not in engine.unavailable:
        raise EngineError(
            "the KV cache is there: only a dropped or offloaded one can be made again"
        )


def _allocate(engine: SglangEngine) -> Change:
    pool = engine.runner.token_to_kv_pool
    blueprint = tuple(pool.kv_buffer)
    transfer.allocator(blueprint)
    before = memory.total_in_use()
    pool.kv_buffer[:] = transfer.zeros(blueprint)
    del engine.unavailable[KV]
    change = _change(blueprint, memory.total_in_use() - before)
    return change.with_fields(rebuilt_buffers=len(blueprint), allocated_bytes=change.changed_bytes)


def _bits(array: jax.Array) -> jax.Array:
    """Return ``array`` as unsigned integers of its width.

    XLA's CPU compiler converts a bfloat16 buffer to float32 and back around an update of a part of
    it: a pass over the whole pool for each block. Integers it updates in place.
    """
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


@partial(jax.jit, static_argnums=2)
def _take(layers: Sequence[jax.Array], start: jax.Array, rows: int) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(_bits(layer), start, rows, 0) for layer in layers]


@lru_cache(maxsize=4)
def _putter(shardings: tuple[Any, ...]) -> Any:
    """Return the function that writes a block of rows into the layers in place."""

    def put(
        layers: Sequence[jax.Array], start: jax.Array, blocks: Sequence[jax.Array]
    ) -> list[jax.Array]:
        updated = [
            jax.lax.dynamic_update_slice_in_dim(_bits(layer), block, start, 0)
            for layer, block in zip(layers, blocks, strict=True)
        ]
        return [
            jax.lax.bitcast_convert_type(bits, layer.dtype)
            for bits, layer in zip(updated, layers, strict=True)
        ]

    return jax.jit(put, donate_argnums=0, out_shardings=list(shardings))


def lowered(layers: Blueprint) -> dict[str, jax.stages.Lowered]:
    """Return the programs of a rebuild, an offload and a restore, by their names in a plan.

    Args:
        layers: shape, dtype and sharding of each layer's buffer.
    """
    start = jax.ShapeDtypeStruct((), jnp.int32)
    put = _putter(tuple(layer.sharding for layer in layers))
    return {
        KV_ZEROS: transfer.lowered_zeros(tuple(layers)),
        KV_TAKE: _take.lower(list(layers), start, _block_rows(layers[0].shape[0])),
        KV_PUT: put.lower(list(layers), start, [_block_of(layer) for layer in layers]),
    }


def _tokens_per_row(layer: jax.Array) -> int:
    """Return the number of tokens in a row of the first axis: a page of them at HEAD."""
    return layer.shape[1] if layer.ndim == _NDIM_OF_HEAD else 1


def _block_starts(rows: np.ndarray[Any, Any], total: int) -> list[int]:
    """Return where the blocks begin that hold all ``rows`` of a buffer of ``total`` rows."""
    last = max(total - _block_rows(total), 0)
    blocks = np.unique(rows // _BLOCK_ROWS) * _BLOCK_ROWS
    return np.unique(np.minimum(blocks, last)).tolist()


def _held(rows: np.ndarray[Any, Any], starts: Sequence[int], total: int) -> int:
    """Return how many of ``rows`` lie in the blocks that begin at ``starts``."""
    in_block = np.zeros(total, bool)
    for start in starts:
        in_block[start : start + _block_rows(total)] = True
    return int(in_block[rows].sum())


def _block_rows(total: int) -> int:
    return min(_BLOCK_ROWS, total)


def _copy_out(
    layers: Sequence[jax.Array], starts: Sequence[int]
) -> list[list[transfer.HostShards]]:
    """Return the blocks at ``starts`` of each layer, on the host."""
    rows = _block_rows(layers[0].shape[0])
    copied: list[list[transfer.HostShards]] = []
    for start in starts:
        blocks = _take(list(layers), np.int32(start), rows)
        if not copied:
            peaks.mark()  # the buffers and a block of each; the blocks are of one size
        with memory.uncounted():  # a block that is read keeps each of its shards as an array too
            copied.append([transfer.to_host(block) for block in blocks])
            del blocks
    return copied


def _copy_in(layers: Sequence[jax.Array], kept: HostKv) -> list[jax.Array]:
    """Return the layers with the kept blocks written into them; the buffers are reused."""
    put = _putter(tuple(layer.sharding for layer in layers))
    current, likes = list(layers), [_block_of(layer) for layer in layers]
    for start, blocks in zip(kept.starts, kept.blocks, strict=True):
        placed = transfer.place_together(blocks, likes)
        if start == kept.starts[0]:
            peaks.mark()
        current = put(current, np.int32(start), placed)
    return jax.block_until_ready(current)


def _block_of(layer: Any) -> jax.ShapeDtypeStruct:
    """Return what :func:`_take` gives of a layer."""
    shape = (_block_rows(layer.shape[0]), *layer.shape[1:])
    dtype = jnp.dtype(f"uint{8 * layer.dtype.itemsize}")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layer.sharding)


def _change(blueprint: Blueprint, changed_bytes: int) -> Change:
    """Return the change of all layers; keys and values of a layer are fused in one buffer."""
    sizes = [sum(memory.bytes_of([layer])) for layer in blueprint]
    fields = {"fused_bytes_total": sum(sizes), "fused_bytes_per_layer": sizes[0]}
    return Change(memory.counted(blueprint), changed_bytes, fields=fields)
