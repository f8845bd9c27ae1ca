"""Bring an offloaded trainer back to the devices."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import TRAINER_LIVE, TRAINER_OFFLOADED
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class TrainerRestored(WorkerPhase):
    """Restore parameters and moments bit for bit; the gradients are zeros until the next step."""

    effect = Effect(needs=(TRAINER_OFFLOADED,), adds=(TRAINER_LIVE,), removes=(TRAINER_OFFLOADED,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        return grown("restore_brings_trainer", ctx.trainer.restore())
