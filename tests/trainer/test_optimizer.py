"""The optimizer's numbers, held against AdamW as it is published and not against optax again."""

from typing import Any

import numpy as np
import pytest

from kvpipe.config.schema import TrainerConfig

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def steps_of_adamw(
    param: Any, gradients: list[Any], learning_rate: float, weight_decay: float
) -> Any:
    """Return the parameter after one step for each gradient."""
    first, second = np.zeros_like(param), np.zeros_like(param)
    for number, gradient in enumerate(gradients, start=1):
        first = BETA_1 * first + (1 - BETA_1) * gradient
        second = BETA_2 * second + (1 - BETA_2) * gradient**2
        mean = first / (1 - BETA_1**number)
        spread = np.sqrt(second / (1 - BETA_2**number))
        param = param - learning_rate * (mean / (spread + EPSILON) + weight_decay * param)
    return param


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(0.1, 0.0), (0.1, 0.5), (0.02, 0.5)])
def test_learning_rate_and_weight_decay_of_the_config_act_as_in_adamw(
    four_devices: None, learning_rate: float, weight_decay: float
) -> None:
    import optax

    from kvpipe.trainer.layout import optimizer

    random = np.random.default_rng(0)
    begun, *gradients = (random.normal(size=(4, 3)).astype("f") for _ in range(4))
    made = optimizer(TrainerConfig(learning_rate=learning_rate, weight_decay=weight_decay))
    params: Any = {"a": begun}
    moments = made.init(params)
    for gradient in gradients:
        updates, moments = made.update({"a": gradient}, moments, params)
        params = optax.apply_updates(params, updates)
    wanted = steps_of_adamw(begun, gradients, learning_rate, weight_decay)
    np.testing.assert_allclose(np.asarray(params["a"]), wanted, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine(four_devices: None) -> None:
    from kvpipe.trainer.layout import learning_rate

    def rates(**options: Any) -> list[float]:
        schedule = learning_rate(TrainerConfig(learning_rate=0.8, **options))
        return [round(float(schedule(step)), 6) for step in range(7)]

    assert rates() == [0.8] * 7
    assert rates(warmup_steps=1) == [0.8] * 7
    assert rates(warmup_steps=4) == [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]
    assert rates(warmup_steps=2, decay_steps=4) == [0.4, 0.8, 0.8, 0.682843, 0.4, 0.117157, 0.0]


def test_clipping_and_the_schedule_act_in_the_update(four_devices: None) -> None:
    import jax

    from kvpipe.trainer.layout import optimizer, steps_of

    begun = np.ones(4, np.float32)
    gradients = [np.full(4, 3.0, np.float32), np.full(4, 0.25, np.float32)]  # norms 6 and 0.5
    made = optimizer(
        TrainerConfig(learning_rate=0.2, weight_decay=0.0, warmup_steps=2, clip_norm=1.0)
    )
    param, moments = begun, made.init(begun)
    for gradient in gradients:
        update, moments = made.update(gradient, moments, param)
        param = param + update
    assert int(steps_of(moments)) == 2
    clipped = [gradients[0] / 6, gradients[1]]
    first = steps_of_adamw(begun, clipped[:1], 0.1, 0.0)
    # The second step's change at the full rate, after a first step at half of it.
    both = (
        first
        + steps_of_adamw(begun, clipped, 0.2, 0.0)
        - steps_of_adamw(begun, clipped[:1], 0.2, 0.0)
    )
    np.testing.assert_allclose(np.asarray(param), both, rtol=1e-5)
    assert len(jax.tree.leaves(moments)) == 4  # two moments, and two counters
