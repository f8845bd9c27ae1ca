"""Compare the trainer's log-probabilities of samples with those that the engine sampled them with.

In float32 a difference of 0.001 fails ``policy_is_synced``; in bfloat16 the two forward passes round
differently, so the differences are only recorded.
"""

from typing import override

from kvpipe.pipeline import facts
from kvpipe.pipeline.about_rollout import AboutRollout
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, TRAINER_AHEAD, TRAINER_LIVE
from kvpipe.pipeline.ledger import POLICY_SCORES, TRAINER_PROGRAM, Size
from kvpipe.pipeline.phase import Effect, Result


class PolicyChecked(AboutRollout):
    """Check that the engine samples from the model that the trainer has.

    The rollout came after the last sync.
    """

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(
            needs=(ENGINE, TRAINER_LIVE, facts.rollout(self.of)),
            forbids=(TRAINER_AHEAD,),
            pools={TRAINER_PROGRAM: Size.TRAINER_PROGRAM},
            runs=(POLICY_SCORES,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.trainer import policy
        from kvpipe.trainer.batch import batch_of, examples_of_samples

        rollout, config = ctx.rollout_of(self.of), ctx.config
        batch = batch_of(examples_of_samples(rollout, ctx.ids_by_prompt), config.trainer)
        found = policy.compared(batch, ctx.trainer.logprobs(batch))
        exact = config.engine.dtype == config.trainer.dtype == "float32"
        return Result(found.fields, (found.check(rollout),) if exact else ())
