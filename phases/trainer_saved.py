"""Save the trainer at the end of a cycle, so that the run can be resumed (``trainer.checkpoint_every``)."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import cycle_of
from kvpipe.pipeline.facts import TRAINER_LIVE, TRAINER_OFFLOADED
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class TrainerSaved(WorkerPhase):
    """Write parameters, moments and numbers of the trainer to ``trainer.checkpoint_dir``.

    One that is on the devices is offloaded meanwhile, and takes as much host memory.
    """

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(needs=(TRAINER_OFFLOADED if TRAINER_OFFLOADED in before else TRAINER_LIVE,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.trainer import checkpoint

        on_devices = not ctx.trainer.kept
        if on_devices:
            ctx.trainer.offload()
        fields = checkpoint.save(ctx, cycle_of(self.step))
        if not on_devices:
            return Result(fields)
        return grown("restore_brings_trainer", ctx.trainer.restore().with_fields(**fields))
