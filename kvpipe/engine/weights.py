"""Weights in a live engine: another set put in its place, streamed in leaf by leaf, or put aside.

A parameter set maps the path of each of the engine's parameters (``transformer.layers.0...``) to a
device array of the very shape, dtype and sharding that the engine's own leaf has, so that the
compiled step takes it without a new compilation.

Everything runs on the scheduler's thread, reading and checking too: until it is done, the engine's
loop neither begins a step nor takes Python's lock from the threads that copy.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax

from kvpipe import progress
from kvpipe.checkpoints import mapped
from kvpipe.engine import memory, peaks, placement
from kvpipe.engine.params import Param, ParamTable, num_leaves, parameters
from kvpipe.engine.sglang import SglangEngine
from kvpipe.engine.weight_check import check_weights
from kvpipe.engine.weight_map import EngineView, HostArray, leaf_sources
from kvpipe.errors import EngineError
from kvpipe.suggest import nearest

__all__ = [
    "HostWeights",
    "WeightChange",
    "build",
    "drop",
    "live_bytes",
    "num_leaves",
    "offload",
    "parameters",
    "replace_leaves",
    "restore",
    "stream",
    "swap",
]

WEIGHTS = "weights"
_BROKEN_OFF = "its weights are incomplete, a change of them broke off; swap others in first"
# Leaves on their way at once: while the last shard of one is copied, the next one is read.
_AT_ONCE = 2
# Where the devices' memory is the host's, its allocator keeps some of the old leaves; it has to give
# them back after as many of the largest leaves.
_LEAVES_UNTRIMMED = 1

HfWeights = Mapping[str, HostArray]


@dataclass(frozen=True)
class WeightChange:
    """What a change of the engine's weights did.

    Attributes:
        num_params: number of parameters.
        param_bytes: their bytes over all devices, from their shapes and shardings.
        changed_bytes: change of the bytes in use over all devices, measured around it.
    """

    num_params: int
    param_bytes: int
    changed_bytes: int


@dataclass(frozen=True)
class HostWeights:
    """The engine's parameters on the host: of each path, every distinct shard by its index."""

    shards: dict[str, dict[placement.Index, HostArray]]

    @property
    def nbytes(self) -> int:
        """Bytes on this host; what its devices replicate is kept once."""
        return sum(shard.nbytes for leaf in self.shards.values() for shard in leaf.values())


def live_bytes(engine: SglangEngine) -> int:
    """Return the bytes of the parameters that are on the devices now, over all devices."""
    here = [p for p in parameters(engine).values() if isinstance(p, jax.Array)]
    return sum(memory.bytes_of(here))


def build(engine: SglangEngine, weights: HfWeights) -> dict[str, jax.Array]:
    """Place ``weights`` on the devices as a new parameter set; the engine keeps its own.

    Args:
        engine: the engine that the set is for.
        weights: arrays by Hugging Face name, in Hugging Face layout.

    Raises:
        EngineError: the weights are not complete, not of the engine's shapes or not finite, or the
            engine stayed busy.
    """
    return engine.on_scheduler.call(lambda: _build_now(engine, weights))


def swap(engine: SglangEngine, new: Mapping[str, jax.Array]) -> None:
    """Let the engine compute with the arrays of ``new``; its old arrays lose this owner.

    The prefix cache is left as it is: it belongs to the old weights until somebody flushes it.

    Raises:
        EngineError: the set is not complete or not of the engine's shapes.
    """
    table = ParamTable(engine)
    _check_set(table.blueprint, new)

    def put() -> None:
        table.put_in_step(new)
        table.tell_model()
        engine.away.pop(WEIGHTS, None)

    engine.on_scheduler.call(put)


def stream(engine: SglangEngine, weights: HfWeights) -> WeightChange:
    """Replace the engine's parameters by ``weights`` leaf by leaf, and flush its prefix cache.

    Each old leaf is freed before its successor is placed, so the devices never hold more than one
    set; of ``weights``, mapped files are read a few leaves at a time and let go again.

    Args:
        engine: the engine; its weights may be away.
        weights: arrays by Hugging Face name, in Hugging Face layout.

    Raises:
        EngineError: the weights are not complete, not of the engine's shapes or not finite, or the
            engine stayed busy; it keeps its old weights. If placing itself fails, the engine
            refuses to generate until another swap.
    """
    return engine.on_scheduler.call(lambda: _stream_now(engine, weights))


def offload(engine: SglangEngine) -> tuple[WeightChange, HostWeights]:
    """Copy the engine's parameters to the host, leaf by leaf, and free them on the devices.

    Raises:
        EngineError: they are away already, or the engine stayed busy.
    """
    kept = HostWeights({})

    def keep(path: str, leaf: Any) -> None:
        kept.shards[path] = placement.to_host(leaf)

    why = "its weights are offloaded; restore them first"
    return engine.on_scheduler.call(lambda: _take_away(engine, why, keep)), kept


def restore(engine: SglangEngine, kept: HostWeights) -> WeightChange:
    """Bring offloaded parameters back to the devices, leaf by leaf; ``kept`` is empty after it.

    Raises:
        EngineError: the engine has weights, or stayed busy.
    """

    def bring() -> WeightChange:
        if WEIGHTS not in engine.away:
            raise EngineError("the weights are there: only weights that are away can be restored")
        return replace_leaves(
            engine,
            ParamTable(engine),
            lambda path, like: placement.begin(kept.shards[path], like),
            lambda path: kept.shards.pop(path),
        )

    return engine.on_scheduler.call(bring)


def drop(engine: SglangEngine) -> WeightChange:
    """Free the engine's parameters; every request is refused until a swap brings others.

    Raises:
        EngineError: they are away already, or the engine stayed busy.
    """
    why = "its weights are dropped; swap others in first"
    return engine.on_scheduler.call(lambda: _take_away(engine, why, lambda path, leaf: None))


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


def _build_now(engine: SglangEngine, weights: HfWeights) -> dict[str, jax.Array]:
    table = ParamTable(engine)
    leaves, blueprint = leaf_sources(engine, table), table.blueprint
    check_weights(leaves, blueprint, weights)
    built: dict[str, jax.Array] = {}
    with _loading(blueprint, built):
        for path, leaf in leaves.items():
            source = weights[leaf.source]
            built[path] = placement.begin(EngineView(source, leaf), blueprint[path]).wait()
            mapped.let_go(source)
    peaks.mark()
    return built


def _stream_now(engine: SglangEngine, weights: HfWeights) -> WeightChange:
    table = ParamTable(engine)
    leaves = leaf_sources(engine, table)
    check_weights(leaves, table.blueprint, weights)
    engine.flush_now()
    hosts = {path: EngineView(weights[leaf.source], leaf) for path, leaf in leaves.items()}
    return replace_leaves(
        engine,
        table,
        lambda path, like: placement.begin(hosts[path], like),
        lambda path: mapped.let_go(weights[leaves[path].source]),
    )


def replace_leaves(
    engine: SglangEngine,
    table: ParamTable,
    begin: Callable[[str, Param], placement.Pending],
    done: Callable[[str], Any] = lambda path: None,
) -> WeightChange:
    """Exchange every leaf; each old one is freed before its successor is begun.

    For functions that run on the scheduler's thread. If it breaks off, the engine refuses to
    generate until another swap.

    Args:
        engine: the engine; its weights may be away.
        table: its parameters.
        begin: begins to make the leaf of a path, with the shape, dtype and sharding that it gets.
        done: called with the path of each leaf that is in its place.
    """
    before = memory.total_in_use()
    blueprint = table.blueprint
    engine.away[WEIGHTS] = _BROKEN_OFF
    table.let_model_go()
    under_way: deque[tuple[str, placement.Pending]] = deque()
    sizes = {path: sum(memory.bytes_of([leaf])) for path, leaf in blueprint.items()}
    largest = max(sizes, key=lambda path: sizes[path])
    placed_bytes = 0
    placed: list[str] = []

    def finish() -> None:
        nonlocal placed_bytes
        path, placing = under_way.popleft()
        table.put_in_step({path: placing.wait()})
        if path == largest:
            peaks.mark()
        done(path)
        placed.append(path)
        placed_bytes += sizes[path]
        if placed_bytes > _LEAVES_UNTRIMMED * sizes[largest]:
            memory.give_back_free_pages()
            placed_bytes = 0

    with _loading(blueprint, placed):
        for path, shape in sorted(blueprint.items(), key=_by_shape):
            if len(under_way) == _AT_ONCE:
                finish()
            table.put_in_step({path: shape})  # frees the old leaf
            under_way.append((path, begin(path, shape)))
        while under_way:
            finish()
    table.tell_model()
    del engine.away[WEIGHTS]
    return _change(blueprint, memory.total_in_use() - before)


def _loading(
    blueprint: Mapping[str, Param], placed: Collection[str]
) -> AbstractContextManager[None]:
    """Tell the progress of a placement: of the leaves of ``blueprint`` those in ``placed``."""
    sizes = {path: sum(memory.bytes_of([leaf])) for path, leaf in blueprint.items()}

    def so_far() -> dict[str, int]:
        paths = list(placed)
        return {progress.LEAVES: len(paths), progress.BYTES: sum(map(sizes.__getitem__, paths))}

    total = {progress.LEAVES: len(sizes), progress.BYTES: sum(sizes.values())}
    return progress.under_way(progress.LOADING, total, so_far)


def _by_shape(item: tuple[str, Param]) -> Any:
    """Sort leaves of one shape next to each other, so that each takes over its forerunner's memory.

    In any other order, what an allocator keeps of the old leaves can add up to a second set.
    """
    path, leaf = item
    return leaf.shape, path


def _take_away(engine: SglangEngine, why: str, keep: Callable[[str, Any], None]) -> WeightChange:
    """Free every leaf, after ``keep`` has seen it."""
    if WEIGHTS in engine.away:
        raise EngineError(f"the weights are not there: {engine.away[WEIGHTS]}")
    before = memory.total_in_use()
    table = ParamTable(engine)
    blueprint = table.blueprint
    engine.away[WEIGHTS] = _BROKEN_OFF
    table.let_model_go()
    for path, shape in blueprint.items():
        with memory.uncounted():  # a leaf keeps each of its shards as an array too
            keep(path, table[path])
            table.put_in_step({path: shape})
    engine.away[WEIGHTS] = why
    return _change(blueprint, memory.total_in_use() - before)


def _change(blueprint: Mapping[str, Param], changed_bytes: int) -> WeightChange:
    return WeightChange(len(blueprint), sum(memory.bytes_of(blueprint.values())), changed_bytes)
