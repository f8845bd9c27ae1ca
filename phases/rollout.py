"""Generate samples of many prompts at once, and compare them with those of an earlier rollout."""

from dataclasses import asdict, replace
from typing import Self, override

from kvpipe.config.schema import at_least, checked
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.ledger import PROGRAM, Size
from kvpipe.pipeline.phase import Effect, OnFailure, Result, follows
from kvpipe.pipeline.rollout import Request, rollout_proven, same_rollout, seed_of
from kvpipe.pipeline.sampled import SampledPhase


class Rollout(SampledPhase):
    """Roll out.

    Attributes:
        n: samples of each prompt, without a unit; follows ``sampling.n``.
        seed: seed of the random numbers, without a unit; null draws one. In the later cycles of
            repeated steps it is one more each time.
        same_rollout_as: name of an earlier step whose token ids and log-probabilities these must
            equal, bit for bit.
        aa_control: this step repeats ``same_rollout_as`` with nothing changed between them.
        shown: samples that the record, the report and W&B have, from the first, without a unit; the
            file has all of them.
    """

    n: int = follows("sampling.n")
    same_rollout_as: str | None = None
    aa_control: bool = False
    shown: int = checked(8, at_least(0))

    on_failure = OnFailure.MAY_CONTINUE

    def __post_init__(self) -> None:
        self.refuse_random(self.same_rollout_as)
        if self.aa_control and self.same_rollout_as is None:
            raise InputError("aa_control is true, but same_rollout_as names no step to repeat")

    @override
    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        same, seed = self.same_rollout_as, self.seed
        if same is None or cycle.name(same) != same:
            same = same and cycle.name(same)
            seed = None if seed is None else seed + cycle.number - 1
        return replace(self, same_rollout_as=same, seed=seed)

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        compared = (facts.rollout(self.same_rollout_as),) if self.same_rollout_as else ()
        return Effect(
            needs=(ENGINE, KV_LIVE, WEIGHTS_LIVE, WEIGHTS_REAL, *compared),
            forbids=(facts.KV_STALE,),
            adds=(facts.KV_WRITTEN, facts.rollout(self.step)),
            pools={PROGRAM: Size.PROGRAM},
            new_tokens=self.max_new_tokens,
            rolls_out=True,
            samples=self.n,
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import rollout

        sampling = self.draw_sampling()
        requests = [
            Request(prompt.id, i, its_ids, seed_of(sampling.seed, prompt.id, i))
            for prompt, its_ids in zip(ctx.prompts, ctx.prompt_ids, strict=True)
            for i in range(self.n)
        ]
        made = ctx.rollouts[self.step] = rollout.roll_out(ctx.engine, requests, sampling)
        checks = list(rollout_proven(made, self.max_new_tokens))
        if (step := self.same_rollout_as) is not None:
            name = "aa_control" if self.aa_control else "same_rollout"
            checks.append(same_rollout(name, ctx.rollout_of(step), made))
        chosen = {"sampling_params": asdict(sampling)}
        return Result(chosen | made.fields(self.shown), tuple(checks), made.lines())
