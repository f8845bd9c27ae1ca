"""Map the engine's parameters to checkpoint tensors, and their shapes to the engine's layout.

Both are read from the engine: the model's ``_create_*_weight_mappings()`` names the Hugging Face
tensor of every parameter and whether it is transposed, and the parameter's shape determines
how its heads are repeated and padded. This module must not contain a table of models.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpipe.engine.params import ParamTable
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import EngineError

HostArray = np.ndarray[Any, np.dtype[Any]]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Heads:
    """The axis of a parameter that counts heads × head_dim, and how the engine widens it.

    Attributes:
        axis: position of the axis in the engine's layout.
        heads, head_dim: in the checkpoint.
        engine_heads, engine_head_dim: in the engine; KV heads are repeated so that each device
            has one, and head_dim is zero-padded where the attention kernel needs it.
    """

    axis: int
    heads: int
    head_dim: int
    engine_heads: int
    engine_head_dim: int


@dataclass(frozen=True)
class Leaf:
    """The checkpoint tensor behind one of the engine's parameters.

    Attributes:
        path: its path in the engine's model.
        source: its Hugging Face name.
        transpose: whether the engine stores [in, out] where Hugging Face stores [out, in].
        heads: how its heads are widened; None if they are not.
    """

    path: str
    source: str
    transpose: bool
    heads: Heads | None

    def fitted_shape(self, given: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a weight of shape ``given`` has in the engine's layout."""
        shape = list(reversed(given) if self.transpose else given)
        heads = self.heads
        if heads and shape[heads.axis : heads.axis + 1] == [heads.heads * heads.head_dim]:
            shape[heads.axis] = heads.engine_heads * heads.engine_head_dim
        return tuple(shape)

    def source_shape(self, engine_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the checkpoint's shape of a parameter that has ``engine_shape`` in the engine."""
        shape = list(engine_shape)
        if self.heads:
            shape[self.heads.axis] = self.heads.heads * self.heads.head_dim
        return tuple(reversed(shape) if self.transpose else shape)


class EngineView:
    """A host weight in the engine's layout, read shard by shard.

    A shard is a view of the weight unless heads are repeated or padded in it, so the weight is
    transposed and widened only during the copy to the device.
    """

    def __init__(self, weight: HostArray, leaf: Leaf) -> None:
        """View ``weight``, which is in Hugging Face layout, in the engine's layout of ``leaf``."""
        self.shape = leaf.fitted_shape(weight.shape)
        self._array = weight.T if leaf.transpose else weight
        self._heads = leaf.heads

    def __getitem__(self, index: Index) -> HostArray:
        heads = self._heads
        if heads is None:
            return self._array[index]
        axis = heads.axis
        start, stop, _ = index[axis].indices(self.shape[axis])
        if start % heads.engine_head_dim or stop % heads.engine_head_dim:
            raise EngineError(f"a shard [{start}:{stop}] of axis {axis} splits a head")
        first, last = start // heads.engine_head_dim, stop // heads.engine_head_dim
        repeats = heads.engine_heads // heads.heads
        shard = self._array[(*index[:axis], slice(None), *index[axis + 1 :])]
        before, after = shard.shape[:axis], shard.shape[axis + 1 :]
        split = shard.reshape(*before, heads.heads, heads.head_dim, *after)
        needed = slice(first // repeats, -(-last // repeats))
        part = split[(*(slice(None),) * axis, needed)]
        if part.shape[axis] != last - first:
            part = np.repeat(part, repeats, axis=axis)
            skipped = first % repeats
            part = part[(*(slice(None),) * axis, slice(skipped, skipped + last - first))]
        if heads.engine_head_dim != heads.head_dim:
            padding = [(0, 0)] * part.ndim
            padding[axis + 1] = (0, heads.engine_head_dim - heads.head_dim)
            part = np.pad(part, padding)
        return part.reshape(*before, stop - start, *after)


def leaf_sources(engine: SglangEngine, table: ParamTable) -> dict[str, Leaf]:
    """Return the checkpoint tensor behind each of the engine's parameters, by path.

    Raises:
        EngineError: as of :func:`sources_of`.
    """
    shapes = {path: leaf.shape for path, leaf in table.params.items()}
    return sources_of(engine.runner, shapes)


def sources_of(runner: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Leaf]:
    """Return the checkpoint tensor behind each parameter of a model runner, by path.

    The runner's model may hold shapes only; ``shapes`` are those of its parameters, by path.

    Raises:
        EngineError: the model has a parameter that its mapping does not name, or that it gives a
            tensor of another layer, of another module or of another parameter.
    """
    model = runner.model
    mappings = {
        mapping.target_path: (source, mapping)
        for source, mapping in weight_mappings(model).items()
        if isinstance(mapping.target_path, str)
    }
    if unnamed := sorted(shapes.keys() - mappings.keys()):
        raise EngineError(
            f"the weight mapping of {type(model).__name__} names no tensor of their own for "
            f"{unnamed}"
        )
    leaves: dict[str, Leaf] = {}
    for path, shape in shapes.items():
        source, mapping = mappings[path]
        transpose = bool(mapping.transpose) and not source.endswith(".bias")
        leaves[path] = Leaf(path, source, transpose, _heads(source, mapping, shape, runner))
    if wrong := disagreeing({path: leaf.source for path, leaf in leaves.items()}):
        raise EngineError(
            f"the weight mapping of {type(model).__name__} gives parameters tensors of other names: "
            f"{', '.join(wrong)}"
        )
    return leaves


def disagreeing(sources: Mapping[str, str]) -> list[str]:
    """Return how a map contradicts the names: ``path = tensor`` for each wrong pair.

    The layer's number, the module and whether it is a bias must agree, and no tensor may be that
    of two parameters. A module that only one side knows by its name, as experts, cannot be compared.

    Args:
        sources: the checkpoint tensor of each parameter, by path.
    """
    ours = {path: _module(path) for path in sources}
    theirs = {name: _module(name) for name in sources.values()}
    known = {parts[-1] for parts in ours.values()} & {parts[-1] for parts in theirs.values()}
    uses = Counter(sources.values())

    def agree(path: str, name: str) -> bool:
        mine, other = ours[path], theirs[name]
        if {mine[-1], other[-1]} & known:
            return mine == other
        return _numbers(mine) == _numbers(other)

    return [
        f"{path} = {name}"
        for path, name in sorted(sources.items())
        if not agree(path, name) or uses[name] > 1 or _is_bias(path) != _is_bias(name)
    ]


def _module(name: str) -> tuple[str, ...]:
    """Return the path of a parameter's module without the root, which the sides call differently."""
    parts = tuple(name.split(".")[:-1])
    return parts[1:] or parts


def _numbers(parts: tuple[str, ...]) -> list[str]:
    return [part for part in parts if part.isdecimal()]


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def weight_mappings(model: Any) -> dict[str, Any]:
    """Return the model's map from Hugging Face name to WeightMapping.

    The method's name contains the model's, so it is found by its pattern.

    Raises:
        EngineError: the model has no such method, or several.
    """
    names = [n for n in dir(model) if n.startswith("_create_") and n.endswith("_weight_mappings")]
    if len(names) != 1:
        raise EngineError(f"{type(model).__name__} has {len(names)} weight mappings, not 1")
    return getattr(model, names[0])()


def _heads(source: str, mapping: Any, shape: tuple[int, ...], runner: Any) -> Heads | None:
    """Return how the engine widens a parameter's heads; None if they are as in the checkpoint."""
    if not mapping.kv_head_padding and not mapping.head_dim_padding:
        return None
    config = runner.model_config
    axis = 0 if ".o_proj." in source else len(shape) - 1
    heads = engine_heads = config.num_attention_heads
    if mapping.kv_head_padding:
        heads = config.get_total_num_kv_heads()
        engine_heads = config.get_total_num_kv_heads_with_replication(runner.tp_size)
    widened = Heads(axis, heads, config.head_dim, engine_heads, shape[axis] // engine_heads)
    same = heads == engine_heads and widened.head_dim == widened.engine_head_dim
    return None if same else widened
