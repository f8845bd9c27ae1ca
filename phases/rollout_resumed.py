"""Finish a paused rollout from where it was, under the same weights or, if so asked, under new ones."""

from dataclasses import asdict, replace
from typing import Self, override

from kvpipe.config.schema import at_least, checked
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.facts import (
    ENGINE,
    IN_FLIGHT,
    IN_FLIGHT_STALE,
    KV_LIVE,
    KV_STALE,
    WEIGHTS_LIVE,
)
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.pipeline.rollout import rollout_continued, rollout_proven, same_rollout


class RolloutResumed(WorkerPhase):
    """Resume.

    Attributes:
        new_weights: other weights than those at the pause make the further tokens; each sample has
            the weights digest of each range of its tokens.
        recompute: flush the prefix cache and compute prompts and tokens so far again by the new
            weights; else the further tokens continue from the KV entries of the old ones.
        same_rollout_as: name of an earlier step whose token ids and log-probabilities these must
            equal, bit for bit.
        shown: samples that the record, the report and W&B have, from the first, without a unit; the
            file has all of them.
    """

    new_weights: bool = False
    recompute: bool = False
    same_rollout_as: str | None = None
    shown: int = checked(8, at_least(0))

    def __post_init__(self) -> None:
        if self.recompute and not self.new_weights:
            raise InputError(
                "recompute is true, but new_weights is false: the same weights would compute the same "
                "again; leave recompute out, or set new_weights=true"
            )

    @override
    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        return replace(
            self, same_rollout_as=self.same_rollout_as and cycle.name(self.same_rollout_as)
        )

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        compared = (facts.rollout(self.same_rollout_as),) if self.same_rollout_as else ()
        stale = (IN_FLIGHT_STALE,)
        return Effect(
            needs=(
                *(ENGINE, IN_FLIGHT, KV_LIVE, WEIGHTS_LIVE),
                *(stale if self.new_weights else ()),
                *compared,
            ),
            forbids=() if self.new_weights else stale,
            adds=(
                facts.rollout(self.step),
                *((facts.mixed(self.step),) if self.new_weights and not self.recompute else ()),
            ),
            removes=(IN_FLIGHT, IN_FLIGHT_STALE, *((KV_STALE,) if self.recompute else ())),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import rollout

        paused = ctx.paused_rollout
        made = ctx.rollouts[self.step] = rollout.resume(ctx.engine, paused, self.recompute)
        ctx.in_flight = None
        checks = [
            *rollout_proven(made, paused.sampling.max_new_tokens),
            *rollout_continued(made, self.new_weights, self.recompute),
        ]
        if (step := self.same_rollout_as) is not None:
            checks.append(same_rollout("same_rollout", ctx.rollout_of(step), made))
        fields = {"sampling_params": asdict(paused.sampling)} | made.fields(self.shown)
        return Result(fields, tuple(checks), made.lines())
