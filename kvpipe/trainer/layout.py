"""The trainer's state as shapes on a mesh: parameters, gradients and AdamW's moments.

Nothing is allocated. The moments come from optax's own ``init``, so the plan counts exactly what
optax allocates, including its scalar step counter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine.training import auto
from kvpipe.pipeline.ledger import TRAINER_SETS, Size
from kvpipe.trainer import batch

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Layout:
    """Shape, dtype and sharding of every array of a trainer, on a number of devices.

    Parameters and gradients are by Hugging Face name, the moments nested as in optax. ``batch`` has
    the arrays of a micro-batch by name, which are on the devices only during a step.
    """

    params: Shapes
    gradients: Shapes
    moments: optax.OptState
    batch: Shapes
    mesh: Mesh

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def leaves(self) -> list[jax.ShapeDtypeStruct]:
        """All arrays of the sets."""
        return jax.tree.leaves((self.params, self.gradients, self.moments))

    @property
    def sets(self) -> dict[Size, list[jax.ShapeDtypeStruct]]:
        """The arrays of each set."""
        trees = zip(TRAINER_SETS, (self.params, self.gradients, self.moments), strict=True)
        return {size: jax.tree.leaves(tree) for size, tree in trees}


def optimizer(config: TrainerConfig) -> optax.GradientTransformation:
    """Return the AdamW optimizer that the config describes, after clipping if there is any."""
    changes = config.warmup_steps or config.decay_steps
    adamw = optax.adamw(
        # A schedule has a counter of its own among the moments.
        learning_rate(config) if changes else config.learning_rate,
        weight_decay=config.weight_decay,
        mu_dtype=config.mu_dtype,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def learning_rate(config: TrainerConfig) -> optax.Schedule:
    """Return the learning rate of each step, from 0: a linear warm-up, then a cosine to zero."""
    rate, warmup = config.learning_rate, config.warmup_steps
    rising = optax.linear_schedule(rate / max(warmup, 1), rate, warmup - 1)
    falling = (
        optax.cosine_decay_schedule(rate, config.decay_steps)
        if config.decay_steps
        else optax.constant_schedule(rate)
    )
    return optax.join_schedules([rising, falling], [warmup])


def steps_of(moments: optax.OptState) -> jax.Array:
    """Return the number of steps that AdamW's moments have seen."""
    return optax.tree.get(
        moments,
        "count",
        filtering=lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByAdamState",
    )


def lay_out(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, config: TrainerConfig) -> Layout:
    """Return the layout of a trainer on the engine's mesh, given its parameters' shapes by name."""
    mesh = auto(mesh)
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
    gradients = of(config.gradients_dtype or config.dtype)
    return Layout(params, gradients, moments, _batch(mesh, config), mesh)


def _batch(mesh: Mesh, config: TrainerConfig) -> Shapes:
    """Return the arrays of a micro-batch, whose rows the first axis of the mesh shares out."""
    axis = mesh.axis_names[0]
    spec = PartitionSpec(None if config.rows % mesh.shape[axis] else axis)
    return {
        name: jax.ShapeDtypeStruct(
            shape, jax.numpy.dtype(dtype), sharding=NamedSharding(mesh, spec)
        )
        for name, (shape, dtype) in batch.shapes(config).items()
    }


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Shard, over each mesh axis, the longest unsharded dimension that the axis divides."""
    axes: list[Any] = [None] * len(shape)
    for axis, size in mesh.shape.items():
        whole = [d for d, taken in enumerate(axes) if taken is None and shape[d] % size == 0]
        if size > 1 and whole:
            axes[max(whole, key=shape.__getitem__)] = axis
    return PartitionSpec(*axes)
