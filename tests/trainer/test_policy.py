"""The distance of the trainer's log-probabilities from those that samples were drawn with."""

import numpy as np
import pytest

from kvpipe.config.schema import TrainerConfig
from kvpipe.pipeline.rollout import Piece
from kvpipe.trainer import policy
from kvpipe.trainer.batch import Batch, Example, batch_of, batch_of_pieces

CONFIG = TrainerConfig(loss="grpo", batch_size=2, length=5)


def batch() -> Batch:
    return batch_of([Example((1, 2), (3, 4), (-0.5, -0.25)), Example((5,), (6,), (-1.0,))], CONFIG)


PIECES = [Piece("a", 1, (7, 8), (3, 4), (-0.5, -0.25)), Piece("b", 0, (), (6,), (-1.0,))]


@pytest.mark.parametrize(("off", "passes"), [(0.0009, True), (0.0011, False)])
def test_the_largest_difference_of_a_sampled_token_decides_and_is_named(
    off: float, passes: bool
) -> None:
    """The forward pass's values for prompt and padding are not compared."""
    logprobs = batch().arrays["sampled"] + np.where(batch().arrays["weights"] > 0, 1e-4, 7)
    logprobs[0, 2] += off - 1e-4
    found = policy.compared(batch(), logprobs)
    check = found.check(PIECES)
    assert (check.name, check.expected, check.passed) == ("policy_is_synced", 1e-3, passes)
    assert check.actual == pytest.approx(off, rel=1e-3)
    assert check.detail.startswith(
        "sample 1 of prompt 'a', token 3: sampled with log-probability -0.25, by "
    )


def test_the_record_has_the_distribution_of_the_sampled_tokens() -> None:
    logprobs = batch().arrays["sampled"] - np.where(batch().arrays["weights"] > 0, 0.5, 7)
    fields = policy.compared(batch(), logprobs).fields
    assert fields["policy_tokens"] == 3
    assert set(fields["policy_difference"]) == {"mean", "median", "p90", "p99", "most"}
    assert set(fields["policy_difference"].values()) == {0.5}


def test_a_piece_follows_its_prompt_and_the_tokens_that_other_weights_made() -> None:
    """The loss need not read log-probabilities, and a sample of other weights alone has none."""
    config = TrainerConfig(loss="sft", data="any.jsonl", batch_size=2, length=6)
    pieces = [Piece("a", 0, (3,), (4, 5), (-0.5, -0.25)), Piece("a", 1, (), (), ())]
    made = batch_of_pieces(pieces, {"a": (1, 2)}, config)
    assert made.arrays["tokens"].tolist() == [[1, 2, 3, 4, 5, 0], [1, 2, 0, 0, 0, 0]]
    assert made.arrays["sampled"].tolist() == [[0, 0, -0.5, -0.25, 0], [0] * 5]
    assert (made.arrays["weights"] > 0).tolist() == [[False, False, True, True, False], [False] * 5]
