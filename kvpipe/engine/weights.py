"""Parameter sets for a live engine: build one from host weights, check it, put it in.

A parameter set maps the path of each of the engine's parameters (``transformer.layers.0...``) to a
device array of the very shape, dtype and sharding that the engine's own leaf has, so that the
compiled step takes it without a new compilation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import EngineError
from kvpipe.suggest import nearest

HostArray = np.ndarray[Any, np.dtype[Any]]
HfWeights = Mapping[str, HostArray]


@dataclass(frozen=True)
class Leaf:
    """Where one of the engine's parameters comes from.

    Attributes:
        path: its path in the engine's model.
        source: its Hugging Face name.
        transpose: whether the engine stores [in, out] where Hugging Face stores [out, in].
        kv_heads: whether its output features are KV heads, which tensor parallelism replicates.
        heads: whether its features are attention heads, whose head_dim the engine may pad.
    """

    path: str
    source: str
    transpose: bool
    kv_heads: bool
    heads: bool


def parameters(engine: SglangEngine) -> dict[str, jax.Array]:
    """Return the engine's parameters by path: the arrays that its compiled step takes."""
    leaves = _step_leaves(engine.runner)
    return {path: leaves[i] for path, i in _positions(engine).items()}


def num_leaves(engine: SglangEngine) -> int:
    """Return the number of arrays in the model's state, parameters and others."""
    return len(_step_leaves(engine.runner))


def leaf_sources(engine: SglangEngine) -> dict[str, Leaf]:
    """Return where each parameter comes from, by path, from the model's own weight mapping.

    Raises:
        EngineError: the model has a parameter that its mapping does not name.
    """
    model = engine.runner.model
    found = {}
    for source, mapping in _weight_mappings(model).items():
        found[mapping.target_path] = Leaf(
            path=mapping.target_path,
            source=source,
            transpose=bool(mapping.transpose) and not source.endswith(".bias"),
            kv_heads=bool(mapping.kv_head_padding),
            heads=bool(mapping.head_dim_padding),
        )
    paths = _parameter_paths(model)
    if unnamed := sorted(paths - found.keys()):
        raise EngineError(f"the weight mapping of {type(model).__name__} does not name {unnamed}")
    return {path: found[path] for path in sorted(paths)}


def build(engine: SglangEngine, weights: HfWeights) -> dict[str, jax.Array]:
    """Place ``weights`` on the devices as a new parameter set; the engine keeps its own.

    Args:
        engine: the engine that the set is for.
        weights: arrays by Hugging Face name, in Hugging Face layout.

    Raises:
        EngineError: a weight is missing, or has another shape than the engine's.
    """
    leaves = leaf_sources(engine)
    check_sources(engine, leaves, weights)
    current = parameters(engine)
    built = {
        path: _place(_fitted(weights[leaf.source], leaf, engine), current[path])
        for path, leaf in leaves.items()
    }
    return jax.block_until_ready(built)


def check_sources(engine: SglangEngine, leaves: Mapping[str, Leaf], weights: HfWeights) -> None:
    """Refuse host weights that are not complete or not of the engine's shapes, by name.

    Raises:
        EngineError: naming the weight, its shape and the shape that is needed.
    """
    if missing := sorted(leaf.source for leaf in leaves.values() if leaf.source not in weights):
        raise EngineError(
            f"{len(missing)} of {len(leaves)} weights are missing, the first is {missing[0]!r}; "
            f"{nearest(missing[0], weights)}"
        )
    current = parameters(engine)
    for path, leaf in leaves.items():
        given = weights[leaf.source]
        fitted = _fitted_shape(given.shape, leaf, engine)
        if fitted != current[path].shape:
            raise EngineError(
                f"weight {leaf.source!r} has shape {given.shape}, which gives {fitted} for "
                f"{path!r}, where the engine has {current[path].shape}"
            )


def check_set(engine: SglangEngine, new: Mapping[str, Any]) -> None:
    """Refuse a parameter set that is not the engine's, by the name of the first wrong leaf.

    Raises:
        EngineError: a leaf is missing, unknown, or of another shape, dtype or sharding.
    """
    current = parameters(engine)
    if missing := sorted(current.keys() - new.keys()):
        raise EngineError(
            f"the parameter set lacks {len(missing)} of {len(current)} leaves, the first is "
            f"{missing[0]!r}"
        )
    if unknown := sorted(new.keys() - current.keys()):
        raise EngineError(
            f"the engine has no parameter {unknown[0]!r}; {nearest(unknown[0], current)}"
        )
    for path, leaf in current.items():
        for what in ("shape", "dtype", "sharding"):
            has, needs = getattr(new[path], what), getattr(leaf, what)
            if has != needs:
                raise EngineError(f"parameter {path!r} has {what} {has}, the engine needs {needs}")


def swap(engine: SglangEngine, new: Mapping[str, jax.Array]) -> None:
    """Let the engine compute with the arrays of ``new``; its old arrays lose this owner.

    Raises:
        EngineError: the set is not complete or not of the engine's shapes.
    """
    check_set(engine, new)
    positions = _positions(engine)

    def put() -> None:
        leaves = _step_leaves(engine.runner)
        for path, position in positions.items():
            leaves[position] = new[path]
        _update_model(engine.runner.model, leaves)

    engine.on_scheduler.call(put)


def _step_leaves(runner: Any) -> list[jax.Array]:
    """Return the list that the compiled step reads its parameters from.

    In 0.0.2 it lives in the closure of ``jitted_run_model``, later on the runner itself.
    """
    if hasattr(runner, "model_state_leaves"):
        return runner.model_state_leaves
    function = runner.jitted_run_model
    names = function.__code__.co_freevars
    return function.__closure__[names.index("model_state_leaves")].cell_contents


def _state(model: Any) -> Any:
    from flax import nnx

    return nnx.split(model)[1]


def _positions(engine: SglangEngine) -> dict[str, int]:
    """Return the position of each parameter in the step's list, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(_state(engine.runner.model))
    positions = {_path_name(path): i for i, (path, _) in enumerate(flat)}
    paths = _parameter_paths(engine.runner.model)
    return {path: positions[path] for path in sorted(paths)}


def _parameter_paths(model: Any) -> set[str]:
    from flax import nnx

    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))
    return {_path_name(path) for path, _ in flat}


def _path_name(path: tuple[Any, ...]) -> str:
    """Return ``a.0.b`` for a pytree path; the last key of a variable is its value."""
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
    if keys and keys[-1] == "value":
        keys.pop()
    return ".".join(str(key) for key in keys)


def _update_model(model: Any, leaves: list[jax.Array]) -> None:
    """Let the model's own variables refer to ``leaves``, so that the old arrays are freed."""
    from flax import nnx

    structure = jax.tree_util.tree_structure(_state(model))
    nnx.update(model, jax.tree_util.tree_unflatten(structure, leaves))


def _weight_mappings(model: Any) -> dict[str, Any]:
    """Return the model's Hugging Face name → WeightMapping; each model names the method itself."""
    names = [n for n in dir(model) if n.startswith("_create_") and n.endswith("_weight_mappings")]
    if len(names) != 1:
        raise EngineError(f"{type(model).__name__} has {len(names)} weight mappings, one is needed")
    return getattr(model, names[0])()


@dataclass(frozen=True)
class _Heads:
    """The axis of a leaf that counts heads × head_dim, and how the engine widens it.

    Attributes:
        axis: position of the axis in the engine's layout.
        heads, head_dim: in the checkpoint.
        engine_heads, engine_head_dim: in the engine; KV heads are repeated so that each device
            has one, and head_dim is padded with zeros where the attention kernel needs it.
    """

    axis: int
    heads: int
    head_dim: int
    engine_heads: int
    engine_head_dim: int


def _heads(leaf: Leaf, engine: SglangEngine) -> _Heads | None:
    """Return the head axis of a leaf; None if it has none or the engine changes nothing."""
    if not leaf.kv_heads and not leaf.heads:
        return None
    config, shape = engine.runner.model_config, parameters(engine)[leaf.path].shape
    axis = 0 if ".o_proj." in leaf.source else len(shape) - 1
    heads = engine_heads = config.num_attention_heads
    if leaf.kv_heads:
        heads = config.get_total_num_kv_heads()
        engine_heads = config.get_total_num_kv_heads_with_replication(engine.runner.tp_size)
    return _Heads(axis, heads, config.head_dim, engine_heads, shape[axis] // engine_heads)


def _fitted_shape(given: tuple[int, ...], leaf: Leaf, engine: SglangEngine) -> tuple[int, ...]:
    """Return the shape that a weight of shape ``given`` has in the engine's layout."""
    shape = list(reversed(given) if leaf.transpose else given)
    heads = _heads(leaf, engine)
    if heads and shape[heads.axis] == heads.heads * heads.head_dim:
        shape[heads.axis] = heads.engine_heads * heads.engine_head_dim
    return tuple(shape)


def _fitted(weight: HostArray, leaf: Leaf, engine: SglangEngine) -> HostArray:
    """Return a weight in the engine's layout: a view, unless heads are repeated or padded."""
    array = weight.T if leaf.transpose else weight
    heads = _heads(leaf, engine)
    if heads is None or array.shape == parameters(engine)[leaf.path].shape:
        return array
    before, after = array.shape[: heads.axis], array.shape[heads.axis + 1 :]
    split = array.reshape(*before, heads.heads, heads.head_dim, *after)
    repeats = heads.engine_heads // heads.heads
    widened = np.repeat(split, repeats, axis=heads.axis)
    padding = [(0, 0)] * widened.ndim
    padding[heads.axis + 1] = (0, heads.engine_head_dim - heads.head_dim)
    return np.pad(widened, padding).reshape(parameters(engine)[leaf.path].shape)


def _place(host: HostArray, like: jax.Array) -> jax.Array:
    """Return ``host`` on the devices with the dtype and sharding of ``like``, shard by shard.

    Never an alias of the host memory: that would be a mapped file, and no device bytes.
    """
    shards = [
        jax.device_put(
            np.ascontiguousarray(host[index]).astype(like.dtype, copy=False),
            device,
            may_alias=False,
        )
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
