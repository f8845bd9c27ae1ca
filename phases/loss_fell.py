"""Check that training has lowered the loss to a share of its first value: ``loss_fell``."""

from typing import override

from kvpipe.config.schema import checked, positive
from kvpipe.errors import PhaseError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import TRAINER_LIVE
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.records.run import Check


class LossFell(WorkerPhase):
    """Compare the loss of the last training step with that of the first one.

    Attributes:
        share: the largest share of it that may be left, without a unit.
    """

    share: float = checked(0.01, positive)

    effect = Effect(needs=(TRAINER_LIVE,), reads_losses=True)

    @override
    def run(self, ctx: WorkerContext) -> Result:
        losses = ctx.trainer.losses
        if not losses:
            raise PhaseError("there was no training step yet")
        first, last = losses[0], losses[-1]
        most = self.share * first
        check = Check("loss_fell", most, last, last <= most, f"it was {first:.6g} at first")
        return Result({"first_loss": first, "last_loss": last}, (check,))
