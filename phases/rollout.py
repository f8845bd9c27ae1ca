"""Generate samples of many prompts at once, and compare them with those of an earlier rollout."""

from dataclasses import asdict, replace
from typing import Self, override

from kvpipe.config.schema import at_least, checked
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.phase import Effect, OnFailure, Result
from kvpipe.pipeline.rollout import rollout_proven, same_rollout
from kvpipe.pipeline.sampled import RollingOutPhase


class Rollout(RollingOutPhase):
    """Generate the samples of all prompts.

    Attributes:
        seed: seed of the random numbers, without a unit; null draws one. In the later cycles of
            repeated steps it is one more each time.
        same_rollout_as: name of an earlier step whose token ids and log-probabilities these must
            equal, bit for bit.
        aa_control: this step repeats ``same_rollout_as`` with nothing changed between them.
        shown: number of samples in the record, the report and W&B, from the first, without a unit;
            the file has all of them.
    """

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
        return self.rolling_out(facts.rollout(self.step), compared=compared)

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import rollout

        sampling = self.draw_sampling()
        requests = self.requests(ctx, sampling.seed)
        made = ctx.rollouts[self.step] = rollout.roll_out(ctx.engine, requests, sampling)
        checks = list(rollout_proven(made, self.max_new_tokens))
        if (step := self.same_rollout_as) is not None:
            name = "aa_control" if self.aa_control else "same_rollout"
            checks.append(same_rollout(name, ctx.rollout_of(step), made))
        chosen = {"sampling_params": asdict(sampling)}
        return Result(chosen | made.fields(self.shown), tuple(checks), made.lines())
