"""Bring an offloaded trainer back to the devices."""

from dataclasses import asdict, dataclass

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.errors import PhaseError
from kvpipe.phase import Effect, Result, WorkerPhase, trainer_pools
from kvpipe.records import check_equal


@dataclass(frozen=True)
class TrainerRestored(WorkerPhase):
    """Restore parameters and moments bit for bit; the gradients are zeros until the next step."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the trainer as it was when it was offloaded."""
        return Effect(
            needs=(facts.TRAINER_OFFLOADED,),
            leaves=(facts.TRAINER_LIVE,),
            takes=(facts.TRAINER_OFFLOADED,),
            pools=trainer_pools(live=True),
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Restore it.

        Raises:
            PhaseError: there is no trainer.
        """
        from kvpipe.engine import memory

        if ctx.trainer is None:
            raise PhaseError("there is no trainer to restore")
        change = ctx.trainer.restore()
        memory.give_back_host_memory()
        back = check_equal("restore_brings_trainer", change.set_bytes, change.changed_bytes)
        return Result(asdict(change), (back,))
