"""Bring the engine's offloaded weights back to the devices."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import PhaseError
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class WeightsRestored(WorkerPhase):
    """Restore the weights and check that exactly their bytes came back."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the weights as they were when they were offloaded."""
        return Effect(
            needs=(facts.ENGINE, facts.WEIGHTS_OFFLOADED),
            leaves=(facts.WEIGHTS_LIVE,),
            takes=(facts.WEIGHTS_OFFLOADED,),
            pools={ledger.PARAMS: Size.PARAMS},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Restore them.

        Raises:
            EngineError: the engine has weights, or stayed busy.
        """
        from kvpipe.engine import memory, weights

        if ctx.weights is None:
            raise PhaseError("there are no offloaded weights to restore")
        change = weights.restore(ctx.engine, ctx.weights)
        ctx.weights = None
        memory.give_back_host_memory()
        fields = {
            "num_params": change.num_params,
            "param_bytes": change.param_bytes,
            "allocated_bytes": change.changed_bytes,
        }
        back = check_equal("restore_brings_params", change.param_bytes, change.changed_bytes)
        return Result(fields, (back,))
