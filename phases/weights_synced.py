"""Transfer the trained weights into the live engine: on the devices, leaf by leaf, no second set."""

from typing import override

from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, TRAINER_AHEAD, TRAINER_LIVE, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.ledger import TRAINER_PROGRAM, WEIGHT_SYNC, Size
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class WeightsSynced(WorkerPhase):
    """Sync the trainer's parameters into the engine; the prefix cache is flushed.

    Requests of a paused rollout stay in flight, and then it is not flushed.
    """

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        stale, flushed = facts.flushed(before)
        return Effect(
            needs=(ENGINE, TRAINER_LIVE),
            # A slot that shares the old arrays would keep them alive beside the new ones.
            forbids=facts.shared_in(before),
            adds=(WEIGHTS_LIVE, WEIGHTS_REAL, *stale),
            # The rewarded samples were drawn from the weights before.
            removes=(TRAINER_AHEAD, *flushed, facts.WEIGHTS_OFFLOADED, facts.SAMPLES_REWARDED),
            pools={TRAINER_PROGRAM: Size.TRAINER_PROGRAM},
            runs=(WEIGHT_SYNC,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import training

        change = training.sync(ctx.engine, ctx.trainer.params)
        ctx.exchanged_weights()
        change = change.with_fields(trained_steps=ctx.trainer.steps)
        return grown("sync_leaves_one_set", change, *ctx.engine.proof.checks)
