"""The training step: seeded gradients, then one optax AdamW update of the whole tree, in place."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvpipe.schema import TrainerConfig
from kvpipe.trainer.layout import Layout, optimizer

GRADIENTS = "seeded"
"""Where the gradients come from. The engine's models have no derivative (their attention writes
the KV cache), and no library at hand has a differentiable forward of them, so the gradients are
normal numbers from a seed: the update, its memory and the weights that it changes are real."""


@dataclass(frozen=True)
class CompiledStep:
    """The programs of a step, compiled for the devices of a layout.

    Attributes:
        gradients: by the shape, dtype and sharding of a gradient, the program that makes one in
            the memory of the last one.
        update: takes parameters, gradients and moments and gives all three in their own memory.
    """

    gradients: Mapping[jax.ShapeDtypeStruct, jax.stages.Compiled]
    update: jax.stages.Compiled

    @property
    def temp_bytes(self) -> int:
        """Temporaries on each device while a program runs; they run one after the other."""
        return max(used.temp_size_in_bytes for used in self._used)

    @property
    def code_bytes(self) -> int:
        """Compiled code on each device."""
        return sum(used.generated_code_size_in_bytes for used in self._used)

    @property
    def in_place_bytes(self) -> int:
        """Bytes on each device of the inputs whose memory the update's outputs take over."""
        return self._used[-1].alias_size_in_bytes

    @property
    def _used(self) -> list[Any]:
        """XLA's account of each program, the update's last."""
        return [p.memory_analysis() for p in (*self.gradients.values(), self.update)]


def compile_step(layout: Layout, config: TrainerConfig) -> CompiledStep:
    """Return the step, compiled for the devices of the layout."""
    kinds = set(layout.gradients.values())
    return CompiledStep(
        {kind: compile_gradient(kind, config.seed) for kind in kinds},
        _compile_update(layout, config),
    )


def gradient_inputs(name: str, number: int) -> tuple[np.uint32, np.uint32]:
    """Return what, beside the seed, decides a gradient: its parameter's name and the step."""
    return np.uint32(zlib.crc32(name.encode())), np.uint32(number)


def compile_gradient(kind: jax.ShapeDtypeStruct, seed: int) -> jax.stages.Compiled:
    """Return the program that makes a gradient of one shape, dtype and sharding.

    It takes the last one, whose memory it takes over, and :func:`gradient_inputs`.
    """

    def seeded(last: jax.Array, name: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), number)
        return jax.random.normal(key, last.shape, last.dtype)

    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    # The last gradient is not read. It is kept as an argument, for the new one to take its memory.
    jitted = jax.jit(seeded, donate_argnums=0, keep_unused=True, out_shardings=kind.sharding)
    return jitted.lower(kind, scalar, scalar).compile()


def _compile_update(layout: Layout, config: TrainerConfig) -> jax.stages.Compiled:
    transformation = optimizer(config)

    def update(params: Any, gradients: Any, moments: Any) -> Any:
        # optax keeps the second moment in the parameters' dtype only if the gradients have it.
        updates, moments = transformation.update(
            optax.tree.cast_like(gradients, params), moments, params
        )
        return optax.apply_updates(params, updates), gradients, moments

    held = (layout.params, layout.gradients, layout.moments)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held)
    jitted = jax.jit(update, donate_argnums=(0, 1, 2), out_shardings=shardings)
    return jitted.lower(*held).compile()
