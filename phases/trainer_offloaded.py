"""Put the trainer aside in host memory, so that a KV cache can take its place."""

from dataclasses import asdict, dataclass

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.errors import PhaseError
from kvpipe.phase import Effect, Result, WorkerPhase, trainer_pools
from kvpipe.records import check_equal


@dataclass(frozen=True)
class TrainerOffloaded(WorkerPhase):
    """Offload parameters and moments; the gradients, which each step makes anew, are freed."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the trainer from the devices; what it has learned is not lost."""
        return Effect(
            needs=(facts.TRAINER_LIVE,),
            leaves=(facts.TRAINER_OFFLOADED,),
            takes=(facts.TRAINER_LIVE,),
            pools=trainer_pools(live=False),
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Offload it.

        Raises:
            PhaseError: there is no trainer.
        """
        from kvpipe.engine import memory

        if ctx.trainer is None:
            raise PhaseError("there is no trainer to offload")
        change = ctx.trainer.offload()
        memory.give_back_host_memory()
        freed = check_equal("offload_frees_trainer", change.set_bytes, -change.changed_bytes)
        return Result(asdict(change), (freed,))
