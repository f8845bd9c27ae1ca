"""The options of the phases that generate tokens, and the requests of those that roll out."""

import secrets
from dataclasses import fields
from typing import Any

from kvpipe.config.schema import SamplingConfig
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, IN_FLIGHT, KV_LIVE, KV_STALE, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.ledger import PROGRAM, Size
from kvpipe.pipeline.phase import Effect, WorkerPhase, follows
from kvpipe.pipeline.rollout import Request, seed_of


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
        options |= {name: list(options[name]) for name in ("stop", "stop_token_ids")}
        seed = secrets.randbits(31) if self.seed is None else self.seed
        options["seed"] = seed if self.temperature else None
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


class RollingOutPhase(SampledPhase):
    """Base of the phases that begin a rollout.

    Attributes:
        n: samples of each prompt, without a unit; follows ``sampling.n``.
    """

    n: int = follows("sampling.n")

    def rolling_out(self, *adds: str, compared: tuple[str, ...] = ()) -> Effect:
        """Return the effect of beginning a rollout.

        Args:
            adds: facts that it adds besides those of every rollout.
            compared: facts about earlier steps that it needs.
        """
        return Effect(
            needs=(ENGINE, KV_LIVE, WEIGHTS_LIVE, WEIGHTS_REAL, *compared),
            forbids=(IN_FLIGHT, KV_STALE),
            adds=(facts.KV_WRITTEN, *adds),
            pools={PROGRAM: Size.PROGRAM},
            new_tokens=self.max_new_tokens,
            rolls_out=True,
            samples=self.n,
        )

    def requests(self, ctx: WorkerContext, seed: int | None) -> list[Request]:
        """Return a request for each sample of each prompt, each with its own seed."""
        return [
            Request(prompt.id, i, its_ids, seed_of(seed, prompt.id, i))
            for prompt, its_ids in zip(ctx.prompts, ctx.prompt_ids, strict=True)
            for i in range(self.n)
        ]
