"""Offload the trainer to host memory, so that a KV cache can have its place."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import TRAINER_LIVE, TRAINER_OFFLOADED
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed


class TrainerOffloaded(WorkerPhase):
    """Offload parameters and moments; the gradients, which each step makes anew, are freed."""

    effect = Effect(needs=(TRAINER_LIVE,), adds=(TRAINER_OFFLOADED,), removes=(TRAINER_LIVE,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        return freed("offload_frees_trainer", ctx.trainer.offload())
