"""The options of the phases that generate tokens."""

import secrets
from dataclasses import fields
from typing import Any

from kvpipe.config.schema import SamplingConfig
from kvpipe.errors import InputError
from kvpipe.pipeline.phase import WorkerPhase, follows


class SampledPhase(WorkerPhase):
    """Base of the phases that generate; each option follows the key of its name in ``sampling``.

    Attributes:
        max_new_tokens: tokens to generate at most.
        temperature: divides the logits, without a unit; 0.0 is greedy.
        ignore_eos: go on after an end-of-sequence token.
        top_p: smallest sum of the candidates' probabilities, without a unit.
        top_k: number of tokens that are candidates, without a unit; null is all of them.
        min_p: least probability of a candidate as a share of the largest one, without a unit.
        stop: texts that end a sample.
        stop_token_ids: token ids that end a sample, without a unit.
        seed: seed of the random numbers, without a unit; null draws one.
    """

    max_new_tokens: int = follows("sampling.max_new_tokens")
    temperature: float = follows("sampling.temperature")
    ignore_eos: bool = follows("sampling.ignore_eos")
    top_p: float = follows("sampling.top_p")
    top_k: int | None = follows("sampling.top_k")
    min_p: float = follows("sampling.min_p")
    stop: tuple[str, ...] = follows("sampling.stop")
    stop_token_ids: tuple[int, ...] = follows("sampling.stop_token_ids")
    seed: int | None = follows("sampling.seed")

    def draw_sampling(self) -> SamplingConfig:
        """Return the sampling parameters; at a temperature they have a seed, a new one if it is null."""
        names = {f.name for f in fields(SamplingConfig)} & {f.name for f in fields(self)}
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("stop", "stop_token_ids"):
            options[name] = list(options[name])
        if self.temperature == 0:
            options["seed"] = None
        elif self.seed is None:
            options["seed"] = secrets.randbits(31)
        return SamplingConfig(**options)

    def refuse_random(self, compared_with: str | None) -> None:
        """Refuse to compare an output that is drawn anew each time.

        Args:
            compared_with: the earlier step that this one must equal; None if there is none.

        Raises:
            InputError: it is compared, at a temperature without a seed.
        """
        if compared_with is not None and self.temperature and self.seed is None:
            raise InputError(
                f"seed is null and temperature is {self.temperature:g}, so the token ids are drawn "
                f"anew each time, but they must equal those of step {compared_with!r}; set "
                "sampling.seed"
            )
