"""The arrays of a batch: which tokens are learnt, and which examples come when."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import PhaseError
from kvpipe.trainer.batch import Example, batch_of, examples_of_step, shapes

CONFIG = TrainerConfig(loss="sft", batch_size=2, length=6)


def test_only_new_tokens_are_learnt_each_with_the_same_share() -> None:
    batch = batch_of([Example((1, 2, 3), (4,)), Example((5,), (6, 7, 8))], CONFIG)
    assert batch.arrays["tokens"].tolist() == [[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 0, 0]]
    assert batch.arrays["weights"].tolist() == [[0, 0, 0.25, 0, 0], [0.25, 0.25, 0.25, 0, 0]]
    assert batch.learnt == 4


def test_micro_batches_have_all_rows_once_in_their_order() -> None:
    config = TrainerConfig(loss="sft", batch_size=4, micro_batch_size=2, length=3)
    batch = batch_of([Example((row,), (row,)) for row in range(4)], config)
    parts = list(batch.parts(config.rows))
    assert [part["tokens"][:, 0].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert sum(part["weights"].sum() for part in parts) == 1


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([Example((1,), (2,))], "trainer.batch_size is 2, but there are 1 examples"),
        ([Example((1,), (2,)), Example((1, 2, 3), (4, 5, 6, 7))], "example 1 of the batch has 3"),
        ([Example((), (2,)), Example((1,), (2,))], "example 0 of the batch has 0 tokens of prompt"),
    ],
)
def test_examples_that_make_no_batch_are_refused(examples: list[Any], message: str) -> None:
    with pytest.raises(PhaseError, match=message):
        batch_of(examples, CONFIG)


def test_each_pass_has_every_example_once_and_an_order_of_its_own() -> None:
    examples = [((number,), (number,)) for number in range(10)]
    config = TrainerConfig(loss="sft", batch_size=4, seed=3)
    drawn = [e.new_ids[0] for step in range(5) for e in examples_of_step(examples, step, config)]
    passes = np.reshape(drawn, (2, 10)).tolist()
    assert [Counter(each) for each in passes] == [Counter(range(10))] * 2
    assert passes[0] != passes[1]
    other = TrainerConfig(loss="sft", batch_size=4, seed=4)
    assert examples_of_step(examples, 0, config) != examples_of_step(examples, 0, other)


def test_a_sample_brings_its_advantage_and_its_sampled_log_probabilities() -> None:
    config = TrainerConfig(loss="grpo", batch_size=2, length=5, kl_coefficient=0.1)
    examples = [Example((1, 2), (3, 4), (-0.5, -0.25), 1.5), Example((5,), (6,), (-1.0,), -1.5)]
    batch = batch_of(examples, config)
    assert batch.arrays["sampled"].tolist() == [[0, -0.5, -0.25, 0], [-1, 0, 0, 0]]
    assert batch.arrays["advantages"].tolist() == [[1.5] * 4, [-1.5] * 4]
    assert shapes(config).keys() - batch.arrays.keys() == {"reference"}
