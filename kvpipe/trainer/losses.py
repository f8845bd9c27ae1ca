"""The losses: what a batch and the model's scores of it give to minimise, beside the numbers to report.

Each is a sum over the tokens of a micro-batch, whose weights are shares of the whole batch. So the
sums of its micro-batches are those of the batch.
"""

from collections.abc import Callable, Mapping

import jax

from kvpipe.engine.forward import Scores
from kvpipe.trainer.batch import WEIGHTS

Loss = Callable[[Scores, Mapping[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]
"""From the scores and the arrays of a micro-batch to its part of the loss and of the numbers."""


def sft(scores: Scores, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the tokens that are learnt, in nats a token."""
    loss = -(scores.logprobs * batch[WEIGHTS]).sum()
    return loss, {"loss": loss, "entropy": (scores.entropies * batch[WEIGHTS]).sum()}


LOSSES: Mapping[str, Loss] = {"sft": sft}
"""The losses by their names in the config."""
