"""Free the trainer, on the devices and on the host."""

from dataclasses import asdict, dataclass

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.errors import PhaseError
from kvpipe.phase import Effect, Result, WorkerPhase, trainer_pools
from kvpipe.records import check_equal


@dataclass(frozen=True)
class TrainerDropped(WorkerPhase):
    """Drop the trainer and check that exactly its bytes came free.

    Attributes:
        unsynced: drop it although it has weights that the engine has not got.
    """

    unsynced: bool = False

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the trainer away for good, wherever it is."""
        where = facts.TRAINER_OFFLOADED if facts.TRAINER_OFFLOADED in before else facts.TRAINER_LIVE
        return Effect(
            needs=(where,),
            forbids=() if self.unsynced else (facts.TRAINER_AHEAD,),
            takes=(where, facts.TRAINER_AHEAD),
            pools=trainer_pools(live=False),
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Drop it.

        Raises:
            PhaseError: there is no trainer.
        """
        from kvpipe.engine import memory

        if ctx.trainer is None:
            raise PhaseError("there is no trainer to drop")
        held = sum(sum(memory.bytes_of(arrays)) for arrays in ctx.trainer.sets.values())
        change = ctx.trainer.drop()
        ctx.trainer = None
        memory.give_back_host_memory()
        freed = check_equal("drop_frees_trainer", held, -change.changed_bytes)
        return Result(asdict(change), (freed,))
