"""Weights in a live engine: another set put in its place, streamed in leaf by leaf, or offloaded.

A parameter set maps the path of each of the engine's parameters (``transformer.layers.0...``) to a
device array of the very shape, dtype and sharding that the engine's own leaf has, so that the
compiled step takes it without a new compilation.

Everything runs on the scheduler's thread, reading and checking too: until it is done, the engine's
loop neither begins a step nor takes Python's lock from the threads that copy.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax

from kvpipe.checkpoints import mapped
from kvpipe.engine import memory, peaks, transfer
from kvpipe.engine.digests import Proof
from kvpipe.engine.params import Param, ParamTable, num_leaves, parameters
from kvpipe.engine.sglang import SglangEngine
from kvpipe.engine.weight_check import check_weights
from kvpipe.engine.weight_map import EngineView, HostArray, leaf_sources
from kvpipe.engine.weight_proof import ParamSet, prove, rules_of
from kvpipe.errors import EngineError
from kvpipe.pipeline.ledger import Change
from kvpipe.records import progress
from kvpipe.suggest import nearest

WEIGHTS = "weights"
_BROKEN_OFF = "its weights are incomplete, a change of them broke off; swap others in first"
# Leaves on their way at once: while the last shard of one is copied, the next one is read.
_AT_ONCE = 2
# Where the devices' memory is the host's, its allocator keeps some of the old leaves; it must give
# them back after as many of the largest leaves.
_LEAVES_UNTRIMMED = 1

HfWeights = Mapping[str, HostArray]
HostWeights = dict[str, transfer.HostShards]
"""The engine's parameters on the host, by path."""


def live_bytes(engine: SglangEngine) -> int:
    """Return the bytes of the parameters that are on the devices now, as these are counted."""
    here = [p for p in parameters(engine).values() if isinstance(p, jax.Array)]
    return memory.counted(here)


def needs_weights(engine: SglangEngine) -> None:
    """Raise an EngineError unless the parameters are on the devices."""
    if WEIGHTS in engine.unavailable:
        raise EngineError(f"the weights are not there: {engine.unavailable[WEIGHTS]}")


def take_digests(engine: SglangEngine) -> None:
    """Compute the digests of the parameters that the engine has, wherever they are from.

    Raises:
        EngineError: the engine stayed busy.
    """
    table = ParamTable(engine)
    rules = rules_of(engine, leaf_sources(engine, table), table.blueprint)
    engine.on_scheduler.call(lambda: prove(engine, table, rules, {}))


def build(engine: SglangEngine, weights: HfWeights) -> ParamSet:
    """Place host weights on the devices as a new parameter set; the engine keeps its own.

    Raises:
        EngineError: the weights are not complete, not of the engine's shapes or not finite, or the
            engine stayed busy.
    """
    return engine.on_scheduler.call(lambda: _build_now(engine, weights))


def swap(engine: SglangEngine, new: Mapping[str, jax.Array]) -> float:
    """Let the engine compute with the arrays of ``new``; return the seconds that it took.

    The engine no longer owns its old arrays. The prefix cache is not flushed, although it belongs to
    the old weights.

    Raises:
        EngineError: the set is not complete or not of the engine's shapes.
    """
    began = time.monotonic()
    table = ParamTable(engine)
    _check_set(table.blueprint, new)
    rules = rules_of(engine, leaf_sources(engine, table), table.blueprint)
    digests = new.digests if isinstance(new, ParamSet) else {}

    def put() -> None:
        table.put_in_step(new)
        table.update_model()
        engine.unavailable.pop(WEIGHTS, None)
        prove(engine, table, rules, digests)

    engine.on_scheduler.call(put)
    return round(time.monotonic() - began, 6)


def stream(engine: SglangEngine, weights: HfWeights) -> Change:
    """Replace the engine's parameters by host weights leaf by leaf, and flush its prefix cache.

    The requests of a paused rollout stay in flight, and then the cache is not flushed.
    Each old leaf is freed before its successor is placed, so the devices never hold more than one
    set; mapped files are read a few leaves at a time and released. The engine's weights may be
    dropped or offloaded.

    Raises:
        EngineError: the weights are not complete, not of the engine's shapes or not finite, or the
            engine stayed busy; it keeps its old weights. If placing itself fails, the engine
            refuses to generate until another swap.
    """
    began = time.monotonic()
    change = engine.on_scheduler.call(lambda: _stream_now(engine, weights))
    swap_s = round(time.monotonic() - began, 6)
    memory.give_back_host_memory()
    return change.with_fields(swap_s=swap_s, num_model_state_leaves=num_leaves(engine))


def offload(engine: SglangEngine) -> tuple[Change, HostWeights]:
    """Copy the engine's parameters to the host, leaf by leaf, and free them on the devices.

    Raises:
        EngineError: they are not on the devices, or the engine stayed busy.
    """
    kept: HostWeights = {}

    def keep(path: str, leaf: Any) -> None:
        kept[path] = transfer.to_host(leaf)

    why = "its weights are offloaded; restore them first"
    change = engine.on_scheduler.call(lambda: _take_away(engine, why, keep))
    memory.give_back_host_memory()
    return change.with_fields(offloaded_bytes=transfer.host_bytes(kept.values())), kept


def restore(engine: SglangEngine, kept: HostWeights) -> Change:
    """Bring offloaded parameters back to the devices, leaf by leaf; ``kept`` is empty after it.

    Raises:
        EngineError: the engine has weights, or stayed busy.
    """

    def bring() -> Change:
        if WEIGHTS not in engine.unavailable:
            raise EngineError("the weights are there: only offloaded weights can be restored")
        table, offloaded = ParamTable(engine), engine.proof
        change = replace_leaves(
            engine, table, lambda path, like: transfer.begin(kept[path], like).wait, kept.pop
        )
        rules = rules_of(engine, leaf_sources(engine, table), table.blueprint)
        return change.with_fields(**prove(engine, table, rules, offloaded.leaves).fields)

    change = engine.on_scheduler.call(bring)
    memory.give_back_host_memory()
    return change.with_fields(allocated_bytes=change.changed_bytes)


def drop(engine: SglangEngine) -> Change:
    """Free the engine's parameters; every request is refused until a swap brings others.

    Raises:
        EngineError: they are not on the devices, or the engine stayed busy.
    """
    why = "its weights are dropped; swap others in first"
    change = engine.on_scheduler.call(lambda: _take_away(engine, why, lambda path, leaf: None))
    engine.proof = Proof()
    memory.give_back_host_memory()
    return change


def release(engine: SglangEngine | None, sets: Iterable[Mapping[str, jax.Array]]) -> int:
    """Delete the arrays of parameter sets, except those that the engine computes with.

    Return the bytes of the deleted arrays over all devices.
    """
    in_use = {id(array) for array in parameters(engine).values()} if engine else set()
    own = [a for arrays in sets for a in arrays.values() if id(a) not in in_use]
    freed_bytes = sum(memory.bytes_of(own))
    for array in own:
        array.delete()
    memory.give_back_host_memory()
    return freed_bytes


def _check_set(blueprint: Mapping[str, Param], new: Mapping[str, Any]) -> None:
    """Refuse a parameter set that is not the engine's, by the name of the first wrong leaf."""
    if missing := sorted(blueprint.keys() - new.keys()):
        raise EngineError(
            f"the parameter set lacks {len(missing)} of {len(blueprint)} leaves, the first is "
            f"{missing[0]!r}"
        )
    if unknown := sorted(new.keys() - blueprint.keys()):
        raise EngineError(
            f"the engine has no parameter {unknown[0]!r}; {nearest(unknown[0], blueprint)}"
        )
    for path, leaf in blueprint.items():
        for what in ("shape", "dtype", "sharding"):
            has, needs = getattr(new[path], what), getattr(leaf, what)
            if has != needs:
                raise EngineError(f"parameter {path!r} has {what} {has}, the engine needs {needs}")


def _build_now(engine: SglangEngine, weights: HfWeights) -> ParamSet:
    table = ParamTable(engine)
    leaves, blueprint = leaf_sources(engine, table), table.blueprint
    built = ParamSet()
    built.digests = check_weights(leaves, blueprint, weights, rules_of(engine, leaves, blueprint))
    with _loading(_sizes(blueprint), built):
        for path, leaf in leaves.items():
            source = weights[leaf.source]
            built[path] = transfer.begin(EngineView(source, leaf), blueprint[path]).wait()
            mapped.let_go(source)
    peaks.mark()
    return built


def _stream_now(engine: SglangEngine, weights: HfWeights) -> Change:
    table = ParamTable(engine)
    leaves = leaf_sources(engine, table)
    rules = rules_of(engine, leaves, table.blueprint)
    expected = check_weights(leaves, table.blueprint, weights, rules)
    engine.flush_for_other_weights()
    hosts = {path: EngineView(weights[leaf.source], leaf) for path, leaf in leaves.items()}
    change = replace_leaves(
        engine,
        table,
        lambda path, like: transfer.begin(hosts[path], like).wait,
        lambda path: mapped.let_go(weights[leaves[path].source]),
    )
    return change.with_fields(**prove(engine, table, rules, expected).fields)


def replace_leaves(
    engine: SglangEngine,
    table: ParamTable,
    begin: Callable[[str, Param], Callable[[], jax.Array]],
    done: Callable[[str], Any] = lambda path: None,
) -> Change:
    """Exchange every leaf; each old one is freed before its successor is begun.

    For functions that run on the scheduler's thread. If it breaks off, the engine refuses to
    generate until another swap.

    Args:
        engine: the engine; its weights may be dropped or offloaded.
        table: its parameters.
        begin: begins to make the leaf of a path, with the shape, dtype and sharding that it gets;
            returns a function that waits until it is complete on the devices and returns it.
        done: called with the path of each leaf that is in its place.
    """
    _begin_change(engine, table)
    replaced_bytes, before = live_bytes(engine), memory.total_in_use()
    blueprint = table.blueprint
    engine.proof = Proof()
    under_way: deque[tuple[str, Callable[[], jax.Array]]] = deque()
    placed = _Placed(table, _sizes(blueprint), done)
    with _loading(placed.sizes, placed.paths):
        for path, shape in sorted(blueprint.items(), key=_by_shape):
            if len(under_way) == _AT_ONCE:
                placed.put(*under_way.popleft())
            table.put_in_step({path: shape})  # frees the old leaf
            under_way.append((path, begin(path, shape)))
        while under_way:
            placed.put(*under_way.popleft())
    table.update_model()
    del engine.unavailable[WEIGHTS]
    return _change(blueprint, memory.total_in_use() - before, replaced_bytes)


def _begin_change(engine: SglangEngine, table: ParamTable) -> None:
    """Make the step's list the only owner of the parameters, as far as others' are garbage.

    In a process that is not kvpipe's own, garbage may hold them, or shards of them. A collection of
    all of it takes tenths of a second, so it runs only if they have other owners.
    """
    engine.unavailable[WEIGHTS] = _BROKEN_OFF
    with memory.uncounted():  # a count has references to all arrays
        is_only_owner = table.let_model_go()
    if not is_only_owner or memory.share_buffers(table.params.values()):
        memory.collect_excluded_garbage()


class _Placed:
    """The leaves that are in their places, among all whose ``sizes`` are given."""

    def __init__(
        self, table: ParamTable, sizes: Mapping[str, int], done: Callable[[str], Any]
    ) -> None:
        self.sizes = sizes
        self.paths: list[str] = []
        self._table = table
        self._done = done
        self._largest = max(sizes, key=sizes.__getitem__)
        self._untrimmed_bytes = 0

    def put(self, path: str, wait: Callable[[], jax.Array]) -> None:
        """Put a leaf in its place once it is complete."""
        self._table.put_in_step({path: wait()})
        if path == self._largest:
            peaks.mark()
        self._done(path)
        self.paths.append(path)
        self._untrimmed_bytes += self.sizes[path]
        if self._untrimmed_bytes > _LEAVES_UNTRIMMED * self.sizes[self._largest]:
            memory.give_back_free_pages()
            self._untrimmed_bytes = 0


def _sizes(blueprint: Mapping[str, Param]) -> dict[str, int]:
    return {path: sum(memory.bytes_of([leaf])) for path, leaf in blueprint.items()}


def _loading(sizes: Mapping[str, int], placed: Collection[str]) -> AbstractContextManager[None]:
    """Report the progress of a placement: which leaves, with their sizes, are ``placed``."""

    def so_far() -> dict[str, int]:
        paths = list(placed)
        return {progress.LEAVES: len(paths), progress.BYTES: sum(map(sizes.__getitem__, paths))}

    total = {progress.LEAVES: len(sizes), progress.BYTES: sum(sizes.values())}
    return progress.under_way(progress.LOADING, total, so_far)


def _by_shape(item: tuple[str, Param]) -> Any:
    """Sort leaves of one shape next to each other, so that each takes over its forerunner's memory.

    In any other order, the allocator's free lists of the old leaves can add up to a second set.
    """
    path, leaf = item
    return leaf.shape, path


def _take_away(engine: SglangEngine, why: str, keep: Callable[[str, Any], None]) -> Change:
    """Free every leaf, after ``keep`` has seen it."""
    needs_weights(engine)
    table = ParamTable(engine)
    _begin_change(engine, table)
    before = memory.total_in_use()
    blueprint = table.blueprint
    for path, shape in blueprint.items():
        with memory.uncounted():  # a leaf keeps each of its shards as an array too
            keep(path, table[path])
            table.put_in_step({path: shape})
    engine.unavailable[WEIGHTS] = why
    change = _change(blueprint, memory.total_in_use() - before)
    return change.with_fields(freed_bytes=change.freed_bytes)


def _change(blueprint: Mapping[str, Param], changed_bytes: int, replaced_bytes: int = 0) -> Change:
    param_bytes = sum(memory.bytes_of(blueprint.values()))
    fields = {"num_params": len(blueprint), "param_bytes": param_bytes}
    return Change(memory.counted(blueprint.values()), changed_bytes, replaced_bytes, fields)
