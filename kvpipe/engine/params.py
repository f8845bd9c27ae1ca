"""Where a live engine keeps its parameters: in its compiled step's list, and in its model.

A place whose array is away holds the ``jax.ShapeDtypeStruct`` of that array, as the KV cache does
with its buffers: the engine stays its own blueprint, and no second state can disagree with it.
"""

from collections.abc import Mapping
from typing import Any

import jax

from kvpipe.engine.mappings import path_name
from kvpipe.engine.sglang import SglangEngine

Param = Any
"""A ``jax.Array``, or the ``jax.ShapeDtypeStruct`` of one that is away: shape, dtype, sharding."""


class ParamTable:
    """The parameters by path, e.g. ``transformer.layers.0.mlp.gate_proj.weight``.

    It is a picture of the engine's structure, which never changes, over its live list of leaves:
    what :meth:`put_in_step` writes is what the next step computes with.
    """

    def __init__(self, engine: SglangEngine) -> None:
        """Find every parameter's position in the step's list, by path.

        By path and not by order: ``load_weights`` of 0.0.2 adds leaves that are no parameters.
        """
        self._model = engine.runner.model
        self._leaves = _step_leaves(engine.runner)
        flat, self._structure = jax.tree_util.tree_flatten_with_path(_state(self._model))
        positions = {path_name(path): i for i, (path, _) in enumerate(flat)}
        self._positions = {path: positions[path] for path in sorted(_param_paths(self._model))}

    @property
    def params(self) -> dict[str, Param]:
        """The parameters as they are now: arrays, or shapes where an array is away."""
        return {path: self._leaves[i] for path, i in self._positions.items()}

    @property
    def blueprint(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape, dtype and sharding that each parameter has to have."""
        return {path: as_shape(leaf) for path, leaf in self.params.items()}

    def __getitem__(self, path: str) -> Param:
        return self._leaves[self._positions[path]]

    def put_in_step(self, new: Mapping[str, Param]) -> None:
        """Let the step alone have ``new`` in place of these parameters.

        An old one is freed at once if the model has let go of it before.
        """
        for path, leaf in new.items():
            self._leaves[self._positions[path]] = leaf

    def let_model_go(self) -> None:
        """Leave the model shapes only, so that the step's list is the one owner."""
        leaves = list(self._leaves)
        for path, shape in self.blueprint.items():
            leaves[self._positions[path]] = shape
        self._update_model(leaves)

    def tell_model(self) -> None:
        """Let the model refer to the very leaves of the step."""
        self._update_model(list(self._leaves))

    def _update_model(self, leaves: list[Any]) -> None:
        from flax import nnx

        nnx.update(self._model, jax.tree_util.tree_unflatten(self._structure, leaves))


def parameters(engine: SglangEngine) -> dict[str, Param]:
    """Return the engine's parameters by path: the arrays that its compiled step takes.

    What is away is given as its shape, dtype and sharding.
    """
    return ParamTable(engine).params


def num_leaves(engine: SglangEngine) -> int:
    """Return the number of arrays in the model's state, parameters and others."""
    return len(_step_leaves(engine.runner))


def as_shape(leaf: Param) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of a parameter."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _step_leaves(runner: Any) -> list[Any]:
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


def _param_paths(model: Any) -> set[str]:
    from flax import nnx

    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))
    return {path_name(path) for path, _ in flat}
