"""GRPO's loss, held against loops over samples and tokens as its papers write it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpipe.config.schema import TrainerConfig
from kvpipe.trainer.batch import Batch, Example, batch_of

PROMPTS, NEW = [(3, 4), (5,), (6, 7, 8), (9,)], [(1, 2, 3), (4, 5), (6,), (7, 8, 9, 1)]
ADVANTAGES = [1.2, -0.7, 0.4, -1.1]
LENGTH = 8
TERMS = {"kl_coefficient": 0.3, "entropy_coefficient": 0.05}


def random_case(**options: Any) -> tuple[TrainerConfig, Batch, dict[str, Any]]:
    """Return a config, a batch, and the scores of its tokens by a model that has moved on.

    What is masked has scores and a reference that would spoil any sum.
    """
    numbers = np.random.default_rng(5)
    config = TrainerConfig(loss="grpo", batch_size=4, length=LENGTH, **options)
    examples = [
        Example(prompt, new, tuple(-2 * numbers.random(len(new))), advantage)
        for prompt, new, advantage in zip(PROMPTS, NEW, ADVANTAGES, strict=True)
    ]
    batch = batch_of(examples, config)
    learnt = batch.arrays["weights"] > 0
    shape = learnt.shape
    drawn = {
        "logprobs": batch.arrays["sampled"] + numbers.normal(0, 0.4, shape),
        "entropies": numbers.random(shape),
        "reference": batch.arrays["sampled"] + numbers.normal(0, 0.4, shape),
    }
    spoilt = {"logprobs": -800.0, "entropies": 1e3, "reference": 900.0}
    return config, batch, {n: np.where(learnt, v, spoilt[n]) for n, v in drawn.items()}


def expected(config: TrainerConfig, batch: Batch, scores: dict[str, Any]) -> dict[str, float]:
    """Return loss and numbers by loops over samples and their new tokens."""
    sums = dict.fromkeys(("kept", "entropy", "clipped_share", "sampled_kl", "kl"), 0.0)
    count = sum(map(len, NEW))
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        for place in range(len(new)):
            at = (row, len(prompt) - 1 + place)
            now, then = scores["logprobs"][at], float(batch.arrays["sampled"][at])
            ratio, advantage = math.exp(now - then), ADVANTAGES[row]
            near = min(max(ratio, 1 - config.clip_ratio), 1 + config.clip_ratio)
            kept = min(ratio * advantage, near * advantage)
            to_reference = scores["reference"][at] - now
            sums["kept"] += kept
            sums["entropy"] += scores["entropies"][at]
            sums["clipped_share"] += kept != ratio * advantage
            sums["sampled_kl"] += ratio - 1 - (now - then)
            sums["kl"] += math.exp(to_reference) - to_reference - 1
    means = {name: total / count for name, total in sums.items()}
    loss = (
        -means.pop("kept")
        + config.kl_coefficient * means["kl"]
        - config.entropy_coefficient * means["entropy"]
    )
    if not config.kl_coefficient:
        del means["kl"]
    return {"loss": loss, **means}


def loss_of(config: TrainerConfig, batch: Batch, scores: dict[str, Any]) -> Callable[..., Any]:
    """Return grpo's loss and numbers as a function of the log-probabilities, over micro-batches."""
    import jax.numpy as jnp

    from kvpipe.engine.forward import Scores
    from kvpipe.trainer.losses import LOSSES

    arrays = {**batch.arrays, "reference": scores["reference"].astype(np.float32)}
    whole = Batch(arrays, batch.learnt)

    def of(logprobs: Any) -> Any:
        total, numbers = jnp.float32(0), {}
        for number, part in enumerate(whole.parts(config.rows)):
            rows = slice(number * config.rows, (number + 1) * config.rows)
            entropies = jnp.asarray(scores["entropies"][rows], jnp.float32)
            on_devices = {name: jnp.asarray(array) for name, array in part.items()}
            loss, found = LOSSES["grpo"](Scores(logprobs[rows], entropies), on_devices, config)
            total += loss
            numbers = {name: numbers.get(name, 0) + value for name, value in found.items()}
        return total, numbers

    return of


@pytest.mark.parametrize("options", [{}, TERMS, {"micro_batch_size": 2, **TERMS}])
def test_loss_and_numbers_are_those_of_the_papers(four_devices: None, options: Any) -> None:
    import jax.numpy as jnp

    config, batch, scores = random_case(**options)
    wanted = expected(config, batch, scores)
    assert 0 < wanted["clipped_share"] < 1
    total, numbers = loss_of(config, batch, scores)(jnp.asarray(scores["logprobs"], jnp.float32))
    assert numbers.keys() == wanted.keys()
    found = {name: float(value) for name, value in numbers.items()}
    assert found == pytest.approx(wanted, rel=1e-5)
    assert float(total) == pytest.approx(wanted["loss"], rel=1e-5)


def test_at_the_sampled_policy_the_gradient_is_the_policy_gradient(four_devices: None) -> None:
    """The better a sample, the more probable each of its tokens becomes; all else has no gradient."""
    import jax
    import jax.numpy as jnp

    config, batch, scores = random_case()
    of = loss_of(config, batch, scores)
    learnt = batch.arrays["weights"] > 0
    logprobs = jnp.asarray(np.where(learnt, batch.arrays["sampled"], -800.0), jnp.float32)
    gradient = jax.grad(lambda logprobs: of(logprobs)[0])(logprobs)
    wanted = np.where(learnt, -np.array(ADVANTAGES)[:, None] / sum(map(len, NEW)), 0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def test_a_token_beyond_the_clip_has_no_gradient_in_the_direction_that_it_went(
    four_devices: None,
) -> None:
    import jax
    import jax.numpy as jnp

    config, batch, scores = random_case()
    learnt = batch.arrays["weights"] > 0
    signs = np.sign(ADVANTAGES)[:, None]
    gone = np.where(learnt, batch.arrays["sampled"] + 0.5 * signs, -800.0)
    back = np.where(learnt, batch.arrays["sampled"] - 0.5 * signs, -800.0)
    gradient = jax.grad(lambda logprobs: loss_of(config, batch, scores)(logprobs)[0])
    assert not np.any(gradient(jnp.asarray(gone, jnp.float32)))
    assert np.all((np.asarray(gradient(jnp.asarray(back, jnp.float32))) != 0) == learnt)
