"""Put host weights on the devices and back: the one way in which kvpipe places a parameter.

Each device gets its own shard straight from the host array, transposed by the copy itself: on two
cores that is 1.5 GB/s a thread, while numpy's own transpose gives 0.3 and a jitted one 0.5.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import jax
import numpy as np

from kvpipe.engine import memory
from kvpipe.engine.params import Param

Index = tuple[slice, ...]


class HostLeaf(Protocol):
    """A parameter on the host, in the engine's layout: an array, or a view that gives shards."""

    def __getitem__(self, index: Any, /) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the shard at ``index``."""
        ...


class Pending(Protocol):
    """A parameter that is being made."""

    def wait(self) -> jax.Array:
        """Return the parameter once all of it is on the devices."""
        ...


@dataclass
class Placing:
    """A parameter on its way to the devices."""

    like: Param
    shards: tuple[Future[jax.Array], ...]

    def wait(self) -> jax.Array:
        """Return the parameter once all of it is on the devices; once only."""
        shards = jax.block_until_ready([shard.result() for shard in self.shards])
        like = self.like
        with memory.uncounted():
            whole = jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
            self.shards = ()
            del shards
        return whole


def begin(host: HostLeaf, like: Param) -> Placing:
    """Begin to place ``host`` with the dtype and sharding of ``like``, shard by shard.

    Never an alias of the host memory: that would be a mapped file, and no device bytes.
    """
    devices = like.sharding.addressable_devices_indices_map(like.shape)
    shards = tuple(
        in_lane(lane, _put, host, index, like.dtype, device)
        for lane, (device, index) in enumerate(devices.items())
    )
    return Placing(like, shards)


def to_host(leaf: jax.Array) -> dict[Index, np.ndarray[Any, np.dtype[Any]]]:
    """Return a copy of each distinct shard; a view would keep the CPU's device memory alive."""
    shards = {shard.index: shard.data for shard in leaf.addressable_shards}
    return {index: np.array(data, copy=True) for index, data in shards.items()}


def in_lane[**P, T](
    lane: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Future[T]:
    """Run ``function`` on the thread of ``lane``; copies and reductions release Python's lock.

    There are a few threads, and a lane is always on the same: glibc keeps what a thread frees for
    that thread, so the shards of a device take over their forerunners' memory.
    """
    threads = _threads()
    return threads[lane % len(threads)].submit(function, *args, **kwargs)


@cache
def _threads() -> tuple[ThreadPoolExecutor, ...]:
    count = min(os.cpu_count() or 1, 8)
    return tuple(ThreadPoolExecutor(1, f"kvpipe::lane{lane}") for lane in range(count))


def _put(host: HostLeaf, index: Index, dtype: Any, device: Any) -> jax.Array:
    shard = host[index].astype(dtype, copy=False)
    return jax.device_put(shard, device, may_alias=False)
