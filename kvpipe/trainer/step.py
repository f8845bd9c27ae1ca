"""The train step: seeded gradients, then one optax AdamW update of the whole tree, in place."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvpipe.config.schema import TrainerConfig
from kvpipe.trainer.layout import Layout, optimizer

GRADIENTS = "seeded"
"""Source of the gradients: normal numbers from a seed. The step computes no loss, but the update,
its memory and the changed weights are real."""


@dataclass(frozen=True)
class CompiledStep:
    """The compiled programs of a step, for the devices of a layout.

    ``gradients`` has, by a gradient's shape, dtype and sharding, the program that writes a new one
    into the old one's buffer; ``update`` maps parameters, gradients and moments to new ones in the
    same buffers.
    """

    gradients: Mapping[jax.ShapeDtypeStruct, jax.stages.Compiled]
    update: jax.stages.Compiled

    @property
    def temp_bytes(self) -> int:
        """Bytes of temporaries on each device; the programs run one at a time."""
        return max(used.temp_size_in_bytes for used in self.used)

    @property
    def set_bytes(self) -> int:
        """Input bytes of the update on each device: all of parameters, gradients and moments."""
        return self.used[-1].argument_size_in_bytes

    @property
    def in_place_bytes(self) -> int:
        """Input bytes on each device that the update's outputs reuse (donated buffers)."""
        return self.used[-1].alias_size_in_bytes

    @property
    def used(self) -> list[Any]:
        """XLA's memory analysis of each program, the update's last."""
        return [p.memory_analysis() for p in (*self.gradients.values(), self.update)]


def compile_step(layout: Layout, config: TrainerConfig) -> CompiledStep:
    """Return the step compiled for the devices of the layout."""
    kinds = set(layout.gradients.values())
    return CompiledStep(
        {kind: compile_gradient(kind, config.seed) for kind in kinds},
        _compile_update(layout, config),
    )


def gradient_inputs(name: str, number: int) -> tuple[np.uint32, np.uint32]:
    """Return a gradient's inputs besides the seed: parameter name (CRC-32) and step number."""
    return np.uint32(zlib.crc32(name.encode())), np.uint32(number)


def compile_gradient(kind: jax.ShapeDtypeStruct, seed: int) -> jax.stages.Compiled:
    """Return the program that makes a gradient of one shape, dtype and sharding.

    Its inputs are the previous gradient, whose buffer it reuses, and :func:`gradient_inputs`.
    """

    def seeded(last: jax.Array, name: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), number)
        return jax.random.normal(key, last.shape, last.dtype)

    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    # The old gradient's values are not read; it stays an argument so that its buffer is donated.
    jitted = jax.jit(seeded, donate_argnums=0, keep_unused=True, out_shardings=kind.sharding)
    return jitted.lower(kind, scalar, scalar).compile()


def _compile_update(layout: Layout, config: TrainerConfig) -> jax.stages.Compiled:
    transformation = optimizer(config)

    def update(params: Any, gradients: Any, moments: Any) -> Any:
        # optax keeps the second moment in the parameters' dtype only if the gradients have that
        # dtype.
        updates, moments = transformation.update(
            optax.tree.cast_like(gradients, params), moments, params
        )
        return optax.apply_updates(params, updates), gradients, moments

    held = (layout.params, layout.gradients, layout.moments)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held)
    jitted = jax.jit(update, donate_argnums=(0, 1, 2), keep_unused=True, out_shardings=shardings)
    return jitted.lower(*held).compile()
