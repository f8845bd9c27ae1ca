"""The gradients of a step, written into the buffers of the last ones: seeded, or those of a loss."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine.forward import Forward
from kvpipe.engine.training import compile_layers
from kvpipe.trainer.batch import TOKENS, Batch
from kvpipe.trainer.layout import Layout
from kvpipe.trainer.losses import LOSSES
from kvpipe.trainer.micro_batches import MicroBatched

# Beside the gradients a program returns scalars and a table of its outputs.
_BESIDE_BYTES = 32 << 10

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Seeded:
    """Normal numbers from a seed: there is no loss and no activation, but the update is real.

    Attributes:
        by_kind: the program of each shape, dtype and sharding.
        layout: shapes, dtypes and shardings of the gradients, by Hugging Face name.
    """

    by_kind: Mapping[jax.ShapeDtypeStruct, jax.stages.Compiled]
    layout: Layout

    @classmethod
    def compiled(cls, layout: Layout, config: TrainerConfig) -> Self:
        """Return its programs for the devices of a layout."""
        kinds = set(layout.gradients.values())
        return cls({kind: compile_seeded(kind, config.seed) for kind in kinds}, layout)

    @property
    def used(self) -> list[Any]:
        """XLA's memory analysis of each program."""
        return [program.memory_analysis() for program in self.by_kind.values()]

    @property
    def temp_bytes(self) -> int:
        """Bytes on a device beside the trainer's sets; the programs run one at a time."""
        return max(used.temp_size_in_bytes for used in self.used)

    @property
    def copied_bytes(self) -> int:
        """Bytes of gradients on a device that do not take over the old ones' memory."""
        return 0

    def __call__(
        self, params: Arrays, last: Arrays, step: int, batch: Batch | None
    ) -> tuple[Arrays, dict[str, float]]:
        """Return the gradients of a step in the buffers of the last ones, and no numbers."""
        del params, batch
        for name, like in self.layout.gradients.items():
            last[name] = self.by_kind[like](last[name], *seeded_inputs(name, step))
        return last, {}


class Learned(MicroBatched):
    """The gradients of a loss of a batch, summed over its micro-batches.

    Its program adds the gradients of a micro-batch to those before it, in their buffers.
    """

    @classmethod
    def compiled(cls, layout: Layout, config: TrainerConfig, forward: Forward) -> Self:
        """Return its program for the devices of a layout."""
        loss = LOSSES[config.loss]

        def accumulate(params: Arrays, last: Arrays, batch: Arrays, first: jax.Array) -> Any:
            def numbers(params: Arrays) -> Any:
                return loss(forward(params, batch[TOKENS]), batch, config)

            found, reported = jax.grad(numbers, has_aux=True)(params)
            summed = {
                name: jnp.where(first, 0, old) + found[name].astype(old.dtype)
                for name, old in last.items()
            }
            return summed, reported

        shardings = {name: like.sharding for name, like in layout.gradients.items()}
        everywhere = NamedSharding(layout.mesh, PartitionSpec())
        jitted = jax.jit(
            accumulate,
            donate_argnums=1,
            keep_unused=True,
            out_shardings=(shardings, everywhere),
        )
        first = jax.ShapeDtypeStruct((), jnp.bool_)
        lowered = jitted.lower(layout.params, layout.gradients, layout.batch, first)
        return cls(compile_layers(lowered, layout.mesh), layout.batch, config)

    @property
    def copied_bytes(self) -> int:
        """Bytes of gradients on a device that do not take over the old ones' memory."""
        copied = self.used[0].output_size_in_bytes - self.used[0].alias_size_in_bytes
        return copied if copied > _BESIDE_BYTES else 0

    def __call__(
        self, params: Arrays, last: Arrays, step: int, batch: Batch | None
    ) -> tuple[Arrays, dict[str, float]]:
        """Return the gradients of a batch in the buffers of the last ones, and the loss's numbers."""
        del step
        assert batch is not None, "a loss needs a batch"
        total: dict[str, float] = {}
        for number, inputs in enumerate(self.placed(batch)):
            # One program at a time, as in a sync.
            last, found = jax.block_until_ready(
                self.program(params, last, inputs, np.bool_(number == 0))
            )
            total = {name: total.get(name, 0.0) + float(value) for name, value in found.items()}
        return last, total


Gradients = Seeded | Learned


def compile_gradients(layout: Layout, config: TrainerConfig, forward: Forward | None) -> Gradients:
    """Return the source of the gradients that the config names.

    Args:
        layout: the trainer's shapes.
        config: its config.
        forward: the forward pass; None if nothing is learnt.
    """
    if forward is None:
        return Seeded.compiled(layout, config)
    return Learned.compiled(layout, config, forward)


def seeded_inputs(name: str, number: int) -> tuple[np.uint32, np.uint32]:
    """Return a seeded gradient's inputs: parameter name (CRC-32) and step number."""
    return np.uint32(zlib.crc32(name.encode())), np.uint32(number)


def compile_seeded(kind: jax.ShapeDtypeStruct, seed: int) -> jax.stages.Compiled:
    """Return the program that makes a seeded gradient of one shape, dtype and sharding.

    Its inputs are the previous gradient, whose buffer it reuses, and :func:`seeded_inputs`.
    """

    def seeded(last: jax.Array, name: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), number)
        return jax.random.normal(key, last.shape, last.dtype)

    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    # The old gradient's values are not read; it stays an argument so that its buffer is donated.
    jitted = jax.jit(seeded, donate_argnums=0, keep_unused=True, out_shardings=kind.sharding)
    return jitted.lower(kind, scalar, scalar).compile()
