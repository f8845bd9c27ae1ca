"""The losses: from a batch and its scores, the value to minimise and the numbers to report.

Each is a sum over the tokens of a micro-batch, whose weights are shares of the whole batch. So the
sums of its micro-batches are those of the batch.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kvpipe.config.schema import TrainerConfig
from kvpipe.engine.forward import Scores
from kvpipe.trainer.batch import ADVANTAGES, REFERENCE, SAMPLED, WEIGHTS

Arrays = Mapping[str, jax.Array]
Loss = Callable[[Scores, Arrays, TrainerConfig], tuple[jax.Array, dict[str, jax.Array]]]
"""From the scores and the arrays of a micro-batch to its part of the loss and of the numbers."""


def sft(
    scores: Scores, batch: Arrays, config: TrainerConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the tokens that are learnt, in nats a token."""
    del config
    loss = -(scores.logprobs * batch[WEIGHTS]).sum()
    return loss, {"loss": loss, "entropy": (scores.entropies * batch[WEIGHTS]).sum()}


def grpo(
    scores: Scores, batch: Arrays, config: TrainerConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped objective with the advantages of groups, each token with the same share.

    The ratio is to the probabilities with which the engine sampled, so differences between the two
    forward passes are clipped too. ``kl`` is the divergence of the trained model from the
    reference, ``sampled_kl`` that of the engine's from the trained one; both are Schulman's
    estimator k3, in nats a token.
    """
    weights = batch[WEIGHTS]

    def mean(values: jax.Array) -> jax.Array:
        return (values * weights).sum()

    def since(earlier: jax.Array) -> jax.Array:
        """Return how much the log-probabilities have risen; nothing where nothing is learnt."""
        return jnp.where(weights > 0, scores.logprobs - earlier, 0)

    risen = since(batch[SAMPLED])
    ratio = jnp.exp(risen)
    near = jnp.clip(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
    gain = ratio * batch[ADVANTAGES]
    kept = jnp.minimum(gain, near * batch[ADVANTAGES])
    entropy = mean(scores.entropies)
    loss = -mean(kept) - config.entropy_coefficient * entropy
    numbers = {
        "entropy": entropy,
        "clipped_share": mean(kept < gain),
        "sampled_kl": mean(_k3(risen)),
    }
    if config.has_reference:
        numbers["kl"] = mean(_k3(-since(batch[REFERENCE])))
        loss += config.kl_coefficient * numbers["kl"]
    return loss, {"loss": loss, **numbers}


def _k3(log_ratio: jax.Array) -> jax.Array:
    """Return the k3 estimate of the KL divergence for each token, in nats.

    ``log_ratio`` is the logarithm of the reference's probability of the token over the model's.
    """
    return jnp.exp(log_ratio) - 1 - log_ratio


LOSSES: Mapping[str, Loss] = {"sft": sft, "grpo": grpo}
"""The losses by their names in the config."""
