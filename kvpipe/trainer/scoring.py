"""The log-probabilities that a set of parameters gives the tokens of a batch, without gradients."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine import memory, transfer
from kvpipe.engine.forward import Forward
from kvpipe.trainer.batch import TOKENS, Array, Batch
from kvpipe.trainer.layout import Layout, Shapes


@dataclass(frozen=True)
class Scorer:
    """The forward pass of a micro-batch, compiled for the devices of a layout.

    Attributes:
        program: from parameters and token ids to log-probabilities.
        layout: the trainer's shapes.
        config: its config.
    """

    program: jax.stages.Compiled
    layout: Layout
    config: TrainerConfig

    @classmethod
    def compiled(
        cls, params: Shapes, layout: Layout, config: TrainerConfig, forward: Forward
    ) -> Self:
        """Return its program for parameters of these shapes, by Hugging Face name."""

        def score(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
            return forward(params, tokens).logprobs

        everywhere = NamedSharding(layout.mesh, PartitionSpec())
        lowered = jax.jit(score, out_shardings=everywhere).lower(params, layout.batch[TOKENS])
        return cls(lowered.compile(), layout, config)

    @property
    def used(self) -> Any:
        """XLA's memory analysis of the program."""
        return self.program.memory_analysis()

    @property
    def temp_bytes(self) -> int:
        """Bytes on a device beside the parameters: temporaries, a micro-batch, what it returns."""
        tokens: Any = self.layout.batch[TOKENS]
        used = self.used
        return used.temp_size_in_bytes + used.output_size_in_bytes + memory.shard_bytes(tokens)

    def __call__(self, params: dict[str, Any], batch: Batch) -> Array:
        """Return the log-probability of each token from the second one on, a row for each sequence."""
        like = self.layout.batch[TOKENS]
        found = []
        for part in batch.parts(self.config.rows):
            # One program at a time, as in a sync.
            scores = self.program(params, transfer.begin(part[TOKENS], like).wait())
            found.append(np.asarray(jax.block_until_ready(scores)))
        return np.concatenate(found)


def compile_scorers(
    layout: Layout, config: TrainerConfig, forward: Forward
) -> tuple[Scorer, Scorer | None]:
    """Return the scorer of the trainer's parameters, and that of the reference if there is one.

    The reference is in the place of the gradients; where these have the parameters' dtype both are
    one program.
    """
    own = Scorer.compiled(layout.params, layout, config, forward)
    if not config.has_reference:
        return own, None
    if layout.gradients == layout.params:
        return own, own
    return own, Scorer.compiled(layout.gradients, layout, config, forward)
