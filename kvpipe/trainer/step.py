"""The training step: one optax AdamW update of the whole tree, in place."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kvpipe.schema import TrainerConfig
from kvpipe.trainer.layout import Layout, Shapes, optimizer

GRADIENTS = "seeded"
"""Where the gradients come from. The engine's models have no derivative (their attention writes
the KV cache), and no library at hand has a differentiable forward of them, so the gradients are
normal numbers from a seed: the update, its memory and the weights it changes are real."""


def compile_step(layout: Layout, config: TrainerConfig) -> jax.stages.Compiled:
    """Return the step, compiled for the devices of the layout.

    It takes parameters, gradients, moments and the number of the step (uint32), gives the first
    three back in their own memory, and then the norms of the gradients and of the update (float32).
    """
    transformation = optimizer(config)

    def step(params: Any, gradients: Any, moments: Any, number: jax.Array) -> Any:
        gradients = _seeded(layout.gradients, config.seed, number)
        # optax keeps the second moment in the parameters' dtype if the gradients have it.
        updates, moments = transformation.update(
            optax.tree.cast_like(gradients, params), moments, params
        )
        return (
            optax.apply_updates(params, updates),
            gradients,
            moments,
            _norm(gradients),
            _norm(updates),
        )

    held = (layout.params, layout.gradients, layout.moments)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held)
    # The old gradients are not read: kept all the same, so that the new ones take their memory.
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1, 2),
        keep_unused=True,
        out_shardings=(*shardings, None, None),
    )
    return jitted.lower(*held, jax.ShapeDtypeStruct((), jnp.uint32)).compile()


def _seeded(shapes: Shapes, seed: int, number: jax.Array) -> dict[str, jax.Array]:
    """Return gradients that depend on the seed, the step and the parameter's name alone."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return {
        name: jax.random.normal(
            jax.random.fold_in(key, zlib.crc32(name.encode())), shape.shape, shape.dtype
        )
        for name, shape in shapes.items()
    }


def _norm(tree: Any) -> jax.Array:
    """Return the norm over all leaves, summed in float32."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))
