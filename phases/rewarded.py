"""Reward the samples of a rollout with ``trainer.reward``, and compare each with its group."""

from typing import override

from kvpipe.pipeline import facts
from kvpipe.pipeline.about_rollout import AboutRollout
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, SAMPLES_REWARDED
from kvpipe.pipeline.phase import Effect, Result
from kvpipe.pipeline.rewards import Rewarded as RewardedSamples


class Rewarded(AboutRollout):
    """Reward samples; rewards and advantages go to a file beside the rollout's."""

    of: str = "rollout"

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(needs=(ENGINE, facts.rollout(self.of)), adds=(SAMPLES_REWARDED,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import multihost

        rollout, found = ctx.rollout_of(self.of), None
        if multihost.rank() == 0:  # a reward may be random
            found = ctx.reward.of(ctx.prompts, rollout.samples)
        found = multihost.of_first(found, ctx.engine.failure.raise_if_failed)
        rewarded = ctx.rewarded = RewardedSamples(rollout, found)
        ctx.reward_means.append(rewarded.mean)
        fields = {"reward": ctx.config.trainer.reward, **rewarded.fields}
        return Result(fields, (rewarded.balanced,), rewarded.lines)
