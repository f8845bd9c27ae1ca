"""The engine's side of training: which tree there is to train, on which devices, and its way back.

The tree is the checkpoint's: names, shapes and layout of Hugging Face, each KV head once. On its way
into the engine a trained parameter stays on the devices. A small program for each kind of parameter
casts, transposes and widens it and lays it out as the engine has it.
"""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from kvpipe.engine import memory, weights
from kvpipe.engine.params import Param, ParamTable, as_shape
from kvpipe.engine.sglang import SglangEngine
from kvpipe.engine.weight_check import check_shapes, check_weights, refuse_infinite
from kvpipe.engine.weight_map import Heads, HostArray, Leaf, leaf_sources
from kvpipe.engine.weight_proof import of_trained, prove, rules_of
from kvpipe.pipeline.ledger import Change

Blueprint = Mapping[str, jax.ShapeDtypeStruct]


def mesh(engine: SglangEngine) -> Mesh:
    """Return the devices of the engine and their axes."""
    return engine.runner.mesh


def auto(mesh: Mesh) -> Mesh:
    """Return a mesh within whose programs XLA chooses the shardings.

    Later engines have explicit axes.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def shared_code(platform: str) -> dict[str, bool]:
    """Return XLA's options for a program over all layers of a model.

    On a TPU they let equal layers share code. By itself XLA does that in some programs only: in others
    each layer of a 3B model takes 25 MB more of the memory of a device.
    """
    return {"xla_tpu_enable_deduplicated_calls": True} if platform == "tpu" else {}


def compile_layers(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compile a program over all layers of a model, for the mesh's kind of devices."""
    options: Any = shared_code(mesh.devices.flat[0].platform)
    return lowered.compile(options)


def shapes(engine: SglangEngine) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter that there is to train, by Hugging Face name."""
    table = ParamTable(engine)
    return source_shapes(leaf_sources(engine, table), table.blueprint)


def source_shapes(
    leaves: Mapping[str, Leaf], blueprint: Mapping[str, Param]
) -> dict[str, tuple[int, ...]]:
    """Return the shape that each parameter of ``blueprint`` has in a checkpoint, by its name there."""
    return {
        leaf.source: leaf.source_shape(blueprint[path].shape)
        for path, leaf in sorted(leaves.items())
    }


def check(engine: SglangEngine, given: Mapping[str, HostArray]) -> None:
    """Refuse host weights, named and laid out as in a checkpoint, that a trainer cannot begin with.

    Raises:
        EngineError: they are not complete, not of the engine's shapes or not finite.
    """
    table = ParamTable(engine)
    check_weights(leaf_sources(engine, table), table.blueprint, given)


def sync(engine: SglangEngine, trained: Mapping[str, jax.Array]) -> Change:
    """Replace the engine's parameters by trained ones leaf by leaf, and flush its prefix cache.

    The requests of a paused rollout stay in flight, and then the cache is not flushed. Each old leaf is freed before its successor is made, so the devices never hold a second set. The
    trained arrays are on the engine's devices, named and laid out as in Hugging Face's checkpoint,
    of any float dtype and any sharding; the engine's weights may be dropped or offloaded.

    Raises:
        EngineError: they are not complete, not of the engine's shapes or not finite in its dtype,
            or the engine stayed busy; it keeps its old weights.
    """
    began = time.monotonic()
    change = engine.on_scheduler.call(lambda: _sync_now(engine, trained))
    sync_s = round(time.monotonic() - began, 6)
    memory.give_back_host_memory()
    return change.with_fields(sync_s=sync_s)


def _sync_now(engine: SglangEngine, trained: Mapping[str, jax.Array]) -> Change:
    table = ParamTable(engine)
    leaves, blueprint = leaf_sources(engine, table), table.blueprint
    check_shapes(leaves, blueprint, trained)
    # Here and below one program at a time: two that exchange shards can wait for each other's
    # threads for ever on a CPU that has fewer cores than devices.
    infinite = [
        leaf.source
        for path, leaf in leaves.items()
        if not bool(_is_finite(trained[leaf.source], blueprint[path].dtype))
    ]
    refuse_infinite(infinite)
    rules = rules_of(engine, leaves, blueprint)
    expected = of_trained(rules, blueprint, trained)
    engine.flush_for_other_weights()
    # Compiled before bytes are counted: code takes memory too.
    movers = {
        path: _mover(leaf, blueprint[path], trained[leaf.source]) for path, leaf in leaves.items()
    }

    def move(path: str, like: Param) -> Callable[[], jax.Array]:
        moved = jax.block_until_ready(movers[path](trained[leaves[path].source]))
        return lambda: moved

    change = weights.replace_leaves(engine, table, move)
    return change.with_fields(**prove(engine, table, rules, expected).fields)


@partial(jax.jit, static_argnums=1)
def _is_finite(weight: jax.Array, dtype: Any) -> jax.Array:
    return jnp.isfinite(weight.astype(dtype)).all()


def lowered(
    leaves: Mapping[str, Leaf], blueprint: Blueprint, trained: Blueprint
) -> dict[str, jax.stages.Lowered]:
    """Return the programs of a sync by the name of the first parameter that each is for.

    ``leaves`` and ``blueprint`` are by the engine's path, ``trained`` is by Hugging Face name.
    """
    kinds: dict[Any, str] = {}
    for path, leaf in leaves.items():
        kind = (leaf.transpose, leaf.heads, blueprint[path], trained[leaf.source])
        kinds.setdefault(kind, leaf.source)
    return {name: _lowered_mover(*kind) for kind, name in kinds.items()}


def _mover(leaf: Leaf, like: jax.ShapeDtypeStruct, given: Any) -> jax.stages.Compiled:
    return _mover_of(leaf.transpose, leaf.heads, like, as_shape(given))


@lru_cache(maxsize=256)
def _mover_of(
    transpose: bool, heads: Heads | None, like: jax.ShapeDtypeStruct, given: jax.ShapeDtypeStruct
) -> jax.stages.Compiled:
    return _lowered_mover(transpose, heads, like, given).compile()


def _lowered_mover(
    transpose: bool, heads: Heads | None, like: jax.ShapeDtypeStruct, given: jax.ShapeDtypeStruct
) -> jax.stages.Lowered:
    """Return the program that lays a trained parameter out as ``like``."""

    def move(weight: jax.Array) -> jax.Array:
        return in_engine_layout(weight, transpose, heads, like.dtype)

    return jax.jit(move, out_shardings=like.sharding).lower(given)


def in_engine_layout(
    weight: jax.Array, transpose: bool, heads: Heads | None, dtype: Any
) -> jax.Array:
    """Return a trained parameter as the engine has it: cast, transposed, its heads widened."""
    cast = weight.astype(dtype)
    return _widened(cast.T if transpose else cast, heads)


def _widened(weight: jax.Array, heads: Heads | None) -> jax.Array:
    """Return ``weight`` with its heads repeated and padded as :class:`EngineView` does it."""
    if heads is None:
        return weight
    axis = heads.axis
    before, after = weight.shape[:axis], weight.shape[axis + 1 :]
    split = weight.reshape(*before, heads.heads, heads.head_dim, *after)
    repeated = jnp.repeat(split, heads.engine_heads // heads.heads, axis=axis)
    padding = [(0, 0)] * repeated.ndim
    padding[axis + 1] = (0, heads.engine_head_dim - heads.head_dim)
    return jnp.pad(repeated, padding).reshape(*before, -1, *after)
