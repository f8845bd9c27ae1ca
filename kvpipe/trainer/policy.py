"""Distance of the trainer's log-probabilities of samples from those that they were sampled with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpipe.pipeline.rollout import Piece
from kvpipe.records.run import Check
from kvpipe.trainer.batch import SAMPLED, WEIGHTS, Array, Batch

# In float32 the two forward passes of the tiny model differ by 7e-5 at most; with any one of its 38
# parameters off by 1 % by 1.3e-2 at least.
_MOST = 1e-3
_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}


@dataclass(frozen=True)
class Differences:
    """The differences of the tokens that were sampled.

    Attributes:
        sizes: absolute difference of each token's log-probabilities, in nats.
        worst: row, place among the sampled tokens of that row, and the two log-probabilities of the
            one with the largest: the sampled one and the trainer's.
    """

    sizes: Array
    worst: tuple[int, int, float, float]

    @property
    def fields(self) -> dict[str, Any]:
        """Fields for a record: the distribution of the differences."""
        found = {name: float(np.quantile(self.sizes, at)) for name, at in _QUANTILES.items()}
        mean = float(self.sizes.mean())
        return {"policy_tokens": self.sizes.size, "policy_difference": {"mean": mean, **found}}

    def check(self, pieces: Sequence[Piece]) -> Check:
        """Return the check that none is too large for float32; a piece is a row of the batch."""
        row, place, sampled, own = self.worst
        piece = pieces[row]
        most = float(self.sizes.max())
        detail = (
            f"{piece.name}, token {len(piece.before) + place}: sampled with log-probability {sampled:.6g}, "
            f"by the trainer's weights it is {own:.6g}"
        )
        return Check("policy_is_synced", _MOST, most, most <= _MOST, detail)


def compared(batch: Batch, logprobs: Array) -> Differences:
    """Return the differences between a batch's sampled log-probabilities and others of its tokens."""
    sampled, learnt = batch.arrays[SAMPLED], batch.arrays[WEIGHTS] > 0
    off = np.where(learnt, np.abs(logprobs - sampled), -1)
    row, column = map(int, np.unravel_index(np.argmax(off), off.shape))
    place = int(learnt[row, :column].sum())
    worst = (row, place, float(sampled[row, column]), float(logprobs[row, column]))
    return Differences(off[learnt], worst)
