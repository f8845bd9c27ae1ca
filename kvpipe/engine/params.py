"""Access to a live engine's parameters: the list that its compiled step reads, and its model.

A dropped parameter is replaced by its ``jax.ShapeDtypeStruct``, as are the KV cache's buffers. So
the engine itself records what to rebuild, and there is no second state to disagree with it.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from kvpipe.engine.sglang import SglangEngine

Param = Any
"""A ``jax.Array``, or the ``jax.ShapeDtypeStruct`` (shape, dtype, sharding) of a dropped one."""


class ParamTable:
    """The parameters by path, e.g. ``transformer.layers.0.mlp.gate_proj.weight``.

    It maps paths, which never change, to positions in the engine's live list of leaves: the next
    step computes with the arrays that :meth:`put_in_step` writes.

    Attributes:
        positions: path → position in the list.
    """

    def __init__(self, engine: SglangEngine) -> None:
        """Find the position of every parameter in the step's list.

        Match by path, not by order: ``load_weights`` of 0.0.2 adds leaves that are not parameters.
        """
        self._model = engine.runner.model
        self._leaves = _step_leaves(engine.runner)
        state = nnx.split(self._model)[1]
        flat, self._structure = jax.tree_util.tree_flatten_with_path(state)
        positions = {path_name(path): i for i, (path, _) in enumerate(flat)}
        paths = param_paths(nnx.state(self._model, nnx.Param))
        self.positions = {path: positions[path] for path in sorted(paths)}

    @property
    def params(self) -> dict[str, Param]:
        """The current parameters: an array, or the shape of a dropped one."""
        return {path: self._leaves[i] for path, i in self.positions.items()}

    @property
    def blueprint(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The required shape, dtype and sharding of each parameter."""
        return {path: as_shape(leaf) for path, leaf in self.params.items()}

    def __getitem__(self, path: str) -> Param:
        return self._leaves[self.positions[path]]

    def put_in_step(self, new: Mapping[str, Param]) -> None:
        """Replace these parameters in the compiled step only.

        An old array is freed at once if :meth:`let_model_go` has run before.
        """
        for path, leaf in new.items():
            self._leaves[self.positions[path]] = leaf

    def let_model_go(self) -> bool:
        """Replace the model's arrays by shapes; return whether the step's list is their only owner."""
        leaves = list(self._leaves)
        for path, shape in self.blueprint.items():
            leaves[self.positions[path]] = shape
        self._set_model(leaves)
        del leaves
        live = [i for i in self.positions.values() if isinstance(self._leaves[i], jax.Array)]
        return all(_references(self._leaves, i) == _IN_ONE_LIST for i in live)

    def update_model(self) -> None:
        """Make the model refer to the same arrays as the step."""
        self._set_model(list(self._leaves))

    def _set_model(self, leaves: list[Any]) -> None:
        nnx.update(self._model, jax.tree_util.tree_unflatten(self._structure, leaves))


def parameters(engine: SglangEngine) -> dict[str, Param]:
    """Return the parameters that the engine's compiled step reads, by path.

    A dropped parameter is returned as its shape, dtype and sharding.
    """
    if not engine.positions:
        engine.positions = ParamTable(engine).positions
    leaves = _step_leaves(engine.runner)
    return {path: leaves[i] for path, i in engine.positions.items()}


def num_leaves(engine: SglangEngine) -> int:
    """Return the number of leaves in the model's state, parameters and others."""
    return len(_step_leaves(engine.runner))


def as_shape(leaf: Param) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of a parameter."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _step_leaves(runner: Any) -> list[Any]:
    """Return the list that the compiled step reads its parameters from.

    In 0.0.2 it is a closure variable of ``jitted_run_model``; later versions keep it on the runner.
    """
    if hasattr(runner, "model_state_leaves"):
        return runner.model_state_leaves
    return closure(runner.jitted_run_model)["model_state_leaves"]


def closure(function: Any) -> dict[str, Any]:
    """Return a function's closure variables by name."""
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def param_paths(state: Any) -> list[str]:
    """Return the path of each leaf of an nnx state, in order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]


def _references(items: Sequence[Any], position: int) -> int:
    """Return the number of references to an item, as the interpreter counts them here."""
    return sys.getrefcount(items[position])


_IN_ONE_LIST = _references([object()], 0)


def path_name(path: tuple[Any, ...]) -> str:
    """Return a pytree path as ``a.0.b``, without the ``value`` key that ends a variable's path."""
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
    if keys and keys[-1] == "value":
        keys.pop()
    return ".".join(str(key) for key in keys)
