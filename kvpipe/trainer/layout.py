"""The trainer's state as shapes on a mesh: parameters, gradients and AdamW's moments.

Nothing is allocated. The moments come from optax's own ``init``, so the plan counts exactly what
optax allocates, including its scalar step counter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvpipe.config.schema import TrainerConfig
from kvpipe.pipeline.ledger import TRAINER_SETS, Size

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Layout:
    """Shape, dtype and sharding of every array of a trainer, on a number of devices.

    Parameters and gradients are by Hugging Face name, the moments nested as in optax.
    """

    params: Shapes
    gradients: Shapes
    moments: optax.OptState
    devices: int

    @property
    def leaves(self) -> list[jax.ShapeDtypeStruct]:
        """All arrays."""
        return jax.tree.leaves((self.params, self.gradients, self.moments))

    @property
    def sets(self) -> dict[Size, list[jax.ShapeDtypeStruct]]:
        """The arrays of each set."""
        trees = zip(TRAINER_SETS, (self.params, self.gradients, self.moments), strict=True)
        return {size: jax.tree.leaves(tree) for size, tree in trees}


def optimizer(config: TrainerConfig) -> optax.GradientTransformation:
    """Return the AdamW optimizer that the config describes."""
    return optax.adamw(
        config.learning_rate, weight_decay=config.weight_decay, mu_dtype=config.mu_dtype
    )


def lay_out(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, config: TrainerConfig) -> Layout:
    """Return the layout of a trainer on the engine's mesh, given its parameters' shapes by name."""
    # XLA chooses the shardings within the step, so the axes are Auto, not Explicit as in later
    # engines.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    placed = {name: NamedSharding(mesh, _spec(shape, mesh)) for name, shape in shapes.items()}

    def of(dtype: str) -> Shapes:
        return {
            name: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=placed[name])
            for name, shape in shapes.items()
        }

    params = of(config.dtype)
    transformation = optimizer(config)
    moments = optax.tree_map_params(
        transformation,
        lambda moment, param: jax.ShapeDtypeStruct(
            moment.shape, moment.dtype, sharding=param.sharding
        ),
        jax.eval_shape(transformation.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
    )
    return Layout(params, of(config.gradients_dtype or config.dtype), moments, mesh.size)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Shard, over each mesh axis, the longest unsharded dimension that the axis divides."""
    axes: list[Any] = [None] * len(shape)
    for axis, size in mesh.shape.items():
        whole = [d for d, taken in enumerate(axes) if taken is None and shape[d] % size == 0]
        if size > 1 and whole:
            axes[max(whole, key=shape.__getitem__)] = axis
    return PartitionSpec(*axes)
