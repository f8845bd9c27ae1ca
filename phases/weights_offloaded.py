"""Put the engine's weights aside in host memory; the devices keep none of them."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class WeightsOffloaded(WorkerPhase):
    """Offload the weights and check that exactly their bytes came free."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the weights from the devices; what they are is not lost, nor is the prefix cache."""
        return Effect(
            needs=(facts.ENGINE, facts.WEIGHTS_LIVE),
            # A slot that shares the arrays would keep their bytes on the devices.
            forbids=tuple(map(facts.shared, facts.shared_slots(before))),
            leaves=(facts.WEIGHTS_OFFLOADED,),
            takes=(facts.WEIGHTS_LIVE,),
            pools={ledger.PARAMS: Size.NOTHING},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Offload them.

        Raises:
            EngineError: they are away already, or the engine stayed busy.
        """
        from kvpipe.engine import lockstep, memory, weights

        change, ctx.weights = weights.offload(ctx.engine)
        memory.give_back_host_memory()
        fields = {
            "num_params": change.num_params,
            "param_bytes": change.param_bytes,
            "freed_bytes": -change.changed_bytes,
            "offloaded_bytes": lockstep.total(ctx.weights.nbytes),
        }
        freed = check_equal("offload_frees_params", change.param_bytes, -change.changed_bytes)
        return Result(fields, (freed,))
