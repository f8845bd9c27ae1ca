"""A batch of examples to learn from: arrays on the host whose shapes the config fixes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import PhaseError
from kvpipe.pipeline.rollout import Piece, Rollout
from kvpipe.units import counted

Array = np.ndarray[Any, np.dtype[Any]]

TOKENS, WEIGHTS = "tokens", "weights"
ADVANTAGES, SAMPLED, REFERENCE = "advantages", "sampled", "reference"
_OF_TOKENS = {"sft": (WEIGHTS,), "grpo": (WEIGHTS, ADVANTAGES, SAMPLED)}
"""The arrays that a loss reads, with a value for each token from the second one on."""


@dataclass(frozen=True)
class Example:
    """A sequence to learn from: the model is to continue the prompt with the new tokens.

    Attributes:
        prompt_ids: token ids that it is given, at least one.
        new_ids: token ids that it learns.
        logprobs: log-probability of each new one when it was sampled; none if the loss does not use
            them.
        advantage: how much better than its group a sample is; without a unit.
    """

    prompt_ids: Sequence[int]
    new_ids: Sequence[int]
    logprobs: Sequence[float] = ()
    advantage: float = 0.0


@dataclass(frozen=True)
class Batch:
    """The arrays of a batch by name, each with a row for each example.

    Attributes:
        arrays: ``tokens`` are the token ids, padded with zeros on the right. The others have a value
            for each token from the second one on: ``weights`` its share in the loss, 0 for prompt and
            padding, ``advantages`` that of its sample, ``sampled`` its log-probability when it was
            sampled, ``reference`` that of the model's files.
        learnt: number of tokens that are learnt.
    """

    arrays: Mapping[str, Array]
    learnt: int

    def parts(self, rows: int) -> Iterator[dict[str, Array]]:
        """Yield the arrays of micro-batches of ``rows`` rows."""
        for first in range(0, len(self.arrays[TOKENS]), rows):
            yield {name: array[first : first + rows] for name, array in self.arrays.items()}


def shapes(config: TrainerConfig) -> dict[str, tuple[tuple[int, int], str]]:
    """Return shape and dtype of each array of a micro-batch; none if nothing is learnt."""
    if not config.learns:
        return {}
    rows, length = config.rows, config.length
    names = [*_OF_TOKENS[config.loss], *([REFERENCE] if config.has_reference else [])]
    of_tokens = {name: ((rows, length - 1), "float32") for name in names}
    return {TOKENS: ((rows, length), "int32"), **of_tokens}


def batch_of(
    examples: Sequence[Example], config: TrainerConfig, of_tokens: Sequence[str] | None = None
) -> Batch:
    """Return a batch in which each new token has the same share in the loss.

    ``of_tokens`` are the arrays that it has besides the token ids; None is those that the loss reads.

    Raises:
        PhaseError: there are not ``trainer.batch_size`` examples, one is longer than
            ``trainer.length``, or one has no prompt.
    """
    if len(examples) != config.batch_size:
        raise PhaseError(
            f"trainer.batch_size is {config.batch_size}, but there are {len(examples)} examples"
        )
    tokens = np.zeros((config.batch_size, config.length), np.int32)
    learns = np.zeros((config.batch_size, config.length - 1), bool)
    sampled, advantages = (np.zeros(learns.shape, np.float32) for _ in range(2))
    for row, example in enumerate(examples):
        ids = [*example.prompt_ids, *example.new_ids]
        if not example.prompt_ids or len(ids) > config.length:
            raise PhaseError(
                f"example {row} of the batch has {counted(len(example.prompt_ids), 'token')} of "
                f"prompt and {len(example.new_ids)} new; it needs at least 1 of prompt and at most "
                f"{config.length} in all (trainer.length)"
            )
        tokens[row, : len(ids)] = ids
        learns[row, len(example.prompt_ids) - 1 : len(ids) - 1] = True
        advantages[row] = example.advantage
        if example.logprobs:
            sampled[row, learns[row]] = example.logprobs
    learnt = int(learns.sum())
    weights = (learns / max(learnt, 1)).astype(np.float32)
    known = {WEIGHTS: weights, ADVANTAGES: advantages, SAMPLED: sampled}
    chosen = {name: known[name] for name in of_tokens or _OF_TOKENS[config.loss]}
    return Batch({TOKENS: tokens, **chosen}, learnt)


def examples_of_samples(
    rollout: Rollout,
    prompt_ids: Mapping[str, Sequence[int]],
    advantages: Sequence[float] | None = None,
) -> list[Example]:
    """Return the samples of a rollout as examples.

    Args:
        rollout: the rollout.
        prompt_ids: token ids of each prompt, by its id.
        advantages: advantage of each sample; None if the loss does not use them.
    """
    samples = rollout.samples
    each = zip(samples, advantages or [0.0] * len(samples), strict=True)
    return [
        Example(prompt_ids[sample.prompt], sample.token_ids, sample.logprobs, advantage)
        for sample, advantage in each
    ]


def batch_of_pieces(
    pieces: Sequence[Piece], prompt_ids: Mapping[str, Sequence[int]], config: TrainerConfig
) -> Batch:
    """Return pieces of samples as a batch to score: each follows the prompt and what is before it."""
    examples = [
        Example([*prompt_ids[piece.prompt], *piece.before], piece.token_ids, piece.logprobs)
        for piece in pieces
    ]
    return batch_of(examples, config, (WEIGHTS, SAMPLED))


def examples_of_step(examples: Sequence[Any], step: int, config: TrainerConfig) -> list[Example]:
    """Return the examples of a step: each pass over all of them has an order of its own.

    Args:
        examples: all that there are, as token ids of the prompt and new ones.
        step: number of the step, from 0.
        config: has the size of a batch, and the seed of the orders.
    """
    total = len(examples)
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {
        turn: np.random.default_rng((config.seed, turn)).permutation(total)
        for turn in {place // total for place in places}
    }
    return [Example(*examples[orders[place // total][place % total]]) for place in places]
