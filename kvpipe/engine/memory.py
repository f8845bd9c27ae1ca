"""Count the bytes of live arrays on the devices, exactly and without making new arrays.

Reading sizes from ``addressable_shards`` would create arrays that the next count finds; the
sharding's ``shard_shape`` gives the same sizes from metadata alone.

Each host counts its own devices only, so that a host which behaved differently is noticed.
"""

import ctypes
import gc
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax

from kvpipe.engine import multihost, physical
from kvpipe.errors import EngineError
from kvpipe.pipeline.ledger import (
    KV,
    OTHER,
    PADDING,
    PARAMS,
    PROGRAM,
    Ledger,
    PerDevice,
    slot_pool,
)

# `jax.live_arrays()` returns strong references, so counts are serialised: a list that lives only
# under this lock cannot keep alive an array that another count finds.
_counting = threading.Lock()
# Array on several devices by the device and address of each of its shards: once looked up, a shard
# stays alive as an array of its own, which a count from another thread must not count again.
_whole_of: dict[tuple[Any, int], weakref.ref[jax.Array]] = {}
_OLDEST = 2  # generation of a full garbage collection
_OTHERS_COLLECTION_S = 0.001
_LONGEST_COLLECTION_S = 60.0


def shard_bytes(array: Any) -> int:
    """Return the bytes of one shard of ``array`` (or of a shape with dtype and sharding)."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def per_device(
    arrays: Iterable[Any], devices: Sequence[Any], size: Callable[[Any], int] = shard_bytes
) -> PerDevice:
    """Return the bytes that ``arrays`` hold on each of ``devices``; deleted arrays count as 0.

    ``size`` gives the bytes of one shard.
    """
    held = (a for a in arrays if not (isinstance(a, jax.Array) and a.is_deleted()))
    return _summed((alike for _, alike in _alike(held)), devices, size)


def _summed(
    kinds: Iterable[Sequence[Any]], devices: Sequence[Any], size: Callable[[Any], int] = shard_bytes
) -> PerDevice:
    """Return the bytes on each of ``devices`` of arrays that come in groups of alike ones."""
    sizes = dict.fromkeys(devices, 0)
    for alike in kinds:
        bytes_ = size(alike[0]) * len(alike)
        for device in alike[0].sharding.device_set & sizes.keys():
            sizes[device] += bytes_
    return tuple(sizes[device] for device in devices)


def _alike(
    arrays: Iterable[Any], pool_of: Mapping[int, str] = MappingProxyType({})
) -> list[tuple[str | None, list[Any]]]:
    """Return the arrays in groups of one pool, shape, dtype and sharding, each with its pool.

    Hundreds of arrays have a few of them. ``pool_of`` has pools by the arrays' ids.
    """
    groups: dict[Any, list[Any]] = {}
    for array in arrays:
        kind = pool_of.get(id(array)), array.shape, array.dtype, array.sharding
        groups.setdefault(kind, []).append(array)
    return [(pool, alike) for (pool, *_), alike in groups.items()]


def live_arrays(collect: bool = True) -> list[jax.Array]:
    """Return every live array, after a garbage collection unless ``collect`` is false."""
    if collect:
        collect_garbage()
    with _counting:
        return [array for array in jax.live_arrays() if not array.is_deleted()]


def wait_for_arrays() -> None:
    """Wait until every live array is computed."""
    jax.block_until_ready(live_arrays(collect=False))


def by_buffer(arrays: Iterable[jax.Array]) -> list[list[jax.Array]]:
    """Return the arrays in groups that share a buffer: an array, its views and its shards.

    Once code reads an array, it may keep its shards, or itself, as further arrays. The buffers of
    one on several devices are looked up only where another on a single device has a shard's shape.
    """
    return _by_buffer(_alike(arrays))


def _by_buffer(
    kinds: Iterable[tuple[str | None, Sequence[jax.Array]]],
) -> list[list[jax.Array]]:
    """Return arrays, which come in groups of alike ones, in groups that share a buffer.

    Those of a pool that are on several devices are left out, unless they may share one.
    """
    single, several = [], []
    for pool, alike in kinds:
        if len(alike[0].sharding.device_set) == 1:
            single.append(alike)
        else:
            several.append((pool, alike))
    shapes = {(alike[0].shape, alike[0].dtype) for alike in single}
    groups: dict[int, list[jax.Array]] = {}
    group_of: dict[tuple[Any, int], list[jax.Array]] = {}
    for pool, alike in several:
        shard_shape = alike[0].sharding.shard_shape(alike[0].shape)
        may_share = (shard_shape, alike[0].dtype) in shapes
        if may_share or pool is None:
            groups |= {id(array): [array] for array in alike}
        for array in alike if may_share else ():
            for shard in array.addressable_shards:
                buffer = shard.device, shard.data.unsafe_buffer_pointer()
                group_of[buffer] = groups[id(array)]
                _whole_of[buffer] = weakref.ref(array)
    for buffer in [buffer for buffer in _whole_of if not _is_shard(buffer)]:
        del _whole_of[buffer]
    for alike in single:
        (device,) = alike[0].sharding.device_set
        for array in alike:
            group = group_of.setdefault((device, array.unsafe_buffer_pointer()), [])
            group.append(array)
            groups.setdefault(id(group[0]), group)
    return list(groups.values())


def _once(arrays: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """Yield the arrays, those on one device once for each buffer, and no known shard of another."""
    seen: set[tuple[Any, int]] = set()
    for array in arrays:
        device, *others = array.sharding.device_set
        if not others:
            try:
                buffer = device, array.unsafe_buffer_pointer()
            except RuntimeError:  # a step has deleted it meanwhile
                continue
            if buffer in seen or _is_shard(buffer):
                continue
            seen.add(buffer)
        yield array


def _is_shard(buffer: tuple[Any, int]) -> bool:
    """Whether a buffer is one of an array on several devices that :func:`by_buffer` has looked at."""
    whole = _whole_of.get(buffer, lambda: None)()
    return whole is not None and not whole.is_deleted()


def share_buffers(arrays: Iterable[Any]) -> bool:
    """Whether another live array is a view or a shard of one of ``arrays``."""
    own = {id(array) for array in arrays}
    groups = by_buffer(live_arrays(collect=False))
    return any(len(group) > 1 and any(id(a) in own for a in group) for group in groups)


def measure(
    params: Iterable[jax.Array],
    kv: Iterable[jax.Array],
    slots: Mapping[str, Iterable[jax.Array]],
    collect: bool = True,
) -> tuple[Ledger, list[list[jax.Array]]]:
    """Attribute every live array of this host to a pool: params, then kv, slots, and other.

    Returns:
        The ledger, and the arrays of the pool other, those that share a buffer in one group.

    An array that belongs to two pools counts for the first, so a slot holds no bytes for arrays
    that the engine computes with. Where the backend reports its bytes in use, those beyond the
    arrays and their padding are the pool ``program``: compiled code and the runtime's buffers.
    Without ``collect`` arrays that only garbage refers to are in the pool other too. Nothing here
    waits for arrays; until they are computed, a backend may not count them.
    """
    devices = jax.local_devices()
    owned = {PARAMS: [*params], KV: [*kv]} | {slot_pool(n): [*a] for n, a in slots.items()}
    pool_of: dict[int, str] = {}
    for pool, arrays in owned.items():
        for array in arrays:
            pool_of.setdefault(id(array), pool)
    # Grouped once: between two steps this takes most of the time of a measurement.
    kinds = _alike(live_arrays(collect), pool_of)
    ledger = Ledger(len(devices))
    for pool in owned:
        ledger = ledger.with_pool(
            pool, _summed((alike for of, alike in kinds if of == pool), devices)
        )
    unpooled = [
        group
        for group in _by_buffer(kinds)
        if not any(id(array) in pool_of for array in group) and group[0].size
    ]
    ledger = ledger.with_pool(OTHER, per_device([group[0] for group in unpooled], devices))
    if device_stats() is not None:
        held = [array for pool, alike in kinds if pool is not None for array in alike]
        held += [group[0] for group in unpooled]
        ledger = ledger.with_pool(
            PADDING, less(per_device(held, devices, given_bytes), ledger.per_device)
        )
        # After the padding, which the compiler may have been asked for.
        in_use = (device["bytes_in_use"] for device in device_stats() or ())
        ledger = ledger.with_pool(PROGRAM, less(in_use, ledger.per_device))
    else:
        check_sizes(alike for _, alike in kinds)
    return ledger, unpooled


def check_sizes(kinds: Iterable[Sequence[jax.Array]]) -> None:
    """Compare :func:`shard_bytes`, which plan and ledger share, with the sizes of the buffers.

    For backends that pad nothing and do not count their bytes in use. The arrays come in groups of
    alike ones, whose buffers have one size: one of each group is asked.

    Raises:
        EngineError: an array has buffers of another size.
    """
    for first, *_ in kinds:
        counted = shard_bytes(first) * len(first.sharding.device_set)
        if (given := first.on_device_size_in_bytes()) != counted:
            raise EngineError(
                f"an array of shape {first.shape}, {first.dtype}, {first.sharding} is counted as "
                f"{counted} bytes over its devices, but its buffers have {given}"
            )


def less(bytes_: Iterable[int], others: Iterable[int]) -> PerDevice:
    """Return the differences on each device."""
    return tuple(a - b for a, b in zip(bytes_, others, strict=True))


def given_bytes(array: Any) -> int:
    """Return the bytes that a device here gives one shard of ``array``, with padding."""
    return physical.shard_bytes(array, counting_device())


def counting_device() -> Any:
    """Return the device whose compiler knows the bytes that an array takes on this host's devices."""
    return jax.local_devices()[0]


def device_stats() -> list[dict[str, int]] | None:
    """Return the backend's integer statistics of each device; None where it has none (CPU)."""
    found = [device.memory_stats() for device in jax.local_devices()]
    if any(stats is None for stats in found):
        return None
    return [{k: v for k, v in stats.items() if isinstance(v, int)} for stats in found if stats]


def bytes_in_use() -> PerDevice:
    """Return the bytes in use on each local device: the backend's count, else live buffers."""
    alive = jax.block_until_ready(live_arrays())
    if device_stats() is not None:
        return used_now()
    return per_device((group[0] for group in by_buffer(alive)), jax.local_devices())


def total_in_use() -> int:
    """Return the bytes in use over all hosts; every host must call it at the same point."""
    return multihost.total(sum(bytes_in_use()))


def used_now() -> PerDevice:
    """Return the bytes in use on each local device at this moment; safe to call from any thread.

    Unlike :func:`bytes_in_use` it neither waits for arrays nor collects garbage.
    """
    if (stats := device_stats()) is not None:
        return tuple(device["bytes_in_use"] for device in stats)
    with _counting:
        return per_device(_once(jax.live_arrays()), jax.local_devices())


@contextmanager
def uncounted() -> Iterator[None]:
    """Block counts of live arrays while two arrays share the same bytes."""
    with _counting:
        yield


def bytes_of(arrays: Iterable[Any], device: Any = None) -> PerDevice:
    """Return the bytes of ``arrays`` on each device of all hosts, from their shardings.

    With a ``device``, those that one of its kind gives them: a TPU pads.
    """
    if device is None:
        return per_device(arrays, jax.devices())
    return per_device(arrays, jax.devices(), lambda array: physical.shard_bytes(array, device))


def counted(arrays: Iterable[Any]) -> int:
    """Return the bytes of ``arrays`` over all hosts as :func:`total_in_use` counts them."""
    return sum(bytes_of(arrays, None if device_stats() is None else counting_device()))


def collect_garbage() -> None:
    """Collect everything that is unreachable now, whichever thread made it.

    ``gc.collect`` does nothing while another thread collects, and jax releases the GIL whenever it
    frees an array, so this call retries until a full collection has run on this thread.

    Raises:
        EngineError: another thread does not finish its collection.
    """
    this_thread, collected = threading.get_ident(), False
    deadline = time.monotonic() + _LONGEST_COLLECTION_S

    def note(phase: str, info: Mapping[str, int]) -> None:
        nonlocal collected
        mine = threading.get_ident() == this_thread
        collected |= mine and phase == "stop" and info["generation"] == _OLDEST

    gc.callbacks.append(note)
    try:
        while True:
            gc.collect()
            if collected:
                break
            if time.monotonic() > deadline:
                raise EngineError(
                    f"bytes cannot be counted: for {_LONGEST_COLLECTION_S:g} s another thread has been "
                    "collecting garbage, in a finalizer that does not return"
                )
            time.sleep(_OTHERS_COLLECTION_S)
    finally:
        gc.callbacks.remove(note)


def exclude_what_lives() -> None:
    """Exclude all objects that live now from later garbage collections, which then take less time."""
    collect_garbage()  # an unreachable object that is frozen is never freed
    gc.freeze()


def collect_excluded_garbage() -> None:
    """Collect the garbage among the objects, too, that are excluded; the others stay so."""
    gc.unfreeze()
    exclude_what_lives()


@contextmanager
def lives_excluded() -> Iterator[None]:
    """Exclude all objects that live now from the garbage collections within the context.

    In a process that is not kvpipe's own they must become collectable again; so do those that other
    code has excluded. What is garbage among them stays until then, so it changes no difference
    between two counts, unless :func:`collect_excluded_garbage` runs between them.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back_host_memory() -> None:
    """Collect garbage and return freed pages to the operating system.

    On the CPU the device buffers are host memory: without this, RSS hardly falls after a drop.
    """
    collect_garbage()
    give_back_free_pages()


def give_back_free_pages() -> None:
    """Make glibc return freed pages, which it otherwise keeps, to the operating system."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
