"""Check that the mean reward has risen since samples were rewarded first: ``reward_rose``."""

from typing import override

from kvpipe.config.schema import checked, positive
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import SAMPLES_REWARDED
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.records.run import Check


class RewardRose(WorkerPhase):
    """Compare the mean reward of the samples that were rewarded last with that of the first ones.

    Attributes:
        by: the least rise, without a unit.
    """

    by: float = checked(0.2, positive)

    effect = Effect(needs=(SAMPLES_REWARDED,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        first, last = ctx.reward_means[0], ctx.reward_means[-1]
        least = first + self.by
        check = Check("reward_rose", least, last, last >= least, f"it was {first:.6g} at first")
        return Result({"first_reward": first, "last_reward": last}, (check,))
