"""Free the trainer, on the devices and on the host."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import TRAINER_AHEAD, TRAINER_LIVE, TRAINER_OFFLOADED
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed


class TrainerDropped(WorkerPhase):
    """Drop the trainer; exactly its bytes must come free.

    Attributes:
        unsynced: allow dropping trained weights that were not synced to the engine.
    """

    unsynced: bool = False

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        where = TRAINER_OFFLOADED if TRAINER_OFFLOADED in before else TRAINER_LIVE
        ahead = () if self.unsynced else (TRAINER_AHEAD,)
        return Effect(needs=(where,), forbids=ahead, removes=(where, TRAINER_AHEAD))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        change = ctx.trainer.drop()
        ctx.made_trainer = None
        return freed("drop_frees_trainer", change)
