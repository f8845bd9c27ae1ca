"""Drop the KV cache of a live engine and build it again, with the same shapes and shardings.

While it is dropped, each layer's place holds the ``jax.ShapeDtypeStruct`` of its buffer: the cache
keeps its own blueprint, and no second state can disagree with it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from kvpipe.engine import memory
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import EngineError

_DROPPED = "its KV cache is dropped; rebuild it first"


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


def buffers(engine: SglangEngine) -> list[jax.Array]:
    """Return the KV buffers that are on the devices; none while the cache is dropped."""
    return [b for b in engine.runner.token_to_kv_pool.kv_buffer if isinstance(b, jax.Array)]


def drop(engine: SglangEngine) -> KvChange:
    """Delete the KV buffers; until the rebuild every request is refused.

    Raises:
        EngineError: the cache is dropped already.
    """
    if engine.unusable == _DROPPED:
        raise EngineError("the KV cache is dropped already")
    engine.unusable = _DROPPED
    return engine.on_scheduler.call(lambda: _drop_now(engine.runner.token_to_kv_pool))


def rebuild(engine: SglangEngine) -> KvChange:
    """Make zeroed KV buffers in the places of the dropped ones and return when they exist.

    Raises:
        EngineError: the cache is there.
    """
    if engine.unusable != _DROPPED:
        raise EngineError("the KV cache is there: only a dropped one can be rebuilt")
    change = engine.on_scheduler.call(lambda: _rebuild_now(engine.runner.token_to_kv_pool))
    engine.unusable = None
    return change


def _drop_now(pool: Any) -> KvChange:
    before = sum(memory.bytes_in_use())
    blueprint = [_blueprint(buffer) for buffer in pool.kv_buffer]
    for layer, buffer in enumerate(pool.kv_buffer):
        pool.kv_buffer[layer] = blueprint[layer]
        buffer.delete()
    return _change(blueprint, sum(memory.bytes_in_use()) - before)


def _rebuild_now(pool: Any) -> KvChange:
    before = sum(memory.bytes_in_use())
    blueprint = tuple(pool.kv_buffer)
    pool.kv_buffer[:] = jax.block_until_ready(_allocator(blueprint)())
    return _change(blueprint, sum(memory.bytes_in_use()) - before)


def _blueprint(buffer: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(buffer.shape, buffer.dtype, sharding=buffer.sharding)


@lru_cache(maxsize=4)
def _allocator(blueprint: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """Return the function that makes all layers at once: compiled once, not once a layer.

    Allocating layer by layer compiles again for each; on a TPU that takes minutes.
    """

    def zeros() -> list[jax.Array]:
        return [jnp.zeros(layer.shape, layer.dtype) for layer in blueprint]

    return jax.jit(zeros, out_shardings=[layer.sharding for layer in blueprint])


def _change(blueprint: Any, changed_bytes: int) -> KvChange:
    sizes = [sum(memory.per_device([layer], jax.devices())) for layer in blueprint]
    return KvChange(sum(sizes), sizes[0], len(sizes), changed_bytes)
