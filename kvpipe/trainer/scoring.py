"""The log-probabilities that a set of parameters gives the tokens of a batch, without gradients."""

from typing import Any, Self, override

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine.forward import Forward
from kvpipe.engine.training import compile_layers
from kvpipe.trainer.batch import TOKENS, Array, Batch
from kvpipe.trainer.layout import Layout, Shapes
from kvpipe.trainer.micro_batches import MicroBatched


class Scorer(MicroBatched):
    """The forward pass of a micro-batch: from parameters and token ids to log-probabilities."""

    @classmethod
    def compiled(
        cls, params: Shapes, layout: Layout, config: TrainerConfig, forward: Forward
    ) -> Self:
        """Return its program for parameters of these shapes, by Hugging Face name."""

        def score(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
            return forward(params, tokens).logprobs

        everywhere = NamedSharding(layout.mesh, PartitionSpec())
        tokens = layout.batch[TOKENS]
        lowered = jax.jit(score, out_shardings=everywhere).lower(params, tokens)
        return cls(compile_layers(lowered, layout.mesh), {TOKENS: tokens}, config)

    @property
    @override
    def temp_bytes(self) -> int:
        """Bytes on a device beside the parameters: temporaries, a micro-batch, its result."""
        return super().temp_bytes + self.used[0].output_size_in_bytes

    def __call__(self, params: dict[str, Any], batch: Batch) -> Array:
        """Return the log-probability of each token from the second one on, a row for each sequence."""
        found = []
        for inputs in self.placed(batch):
            # One program at a time, as in a sync.
            scores = self.program(params, inputs[TOKENS])
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
