"""Free the engine's weights; it cannot generate until a swap brings others."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class WeightsDropped(WorkerPhase):
    """Drop the weights and check that exactly their bytes came free."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the weights away for good."""
        return Effect(
            needs=(facts.ENGINE, facts.WEIGHTS_LIVE),
            # A slot that shares the arrays would keep their bytes on the devices.
            forbids=tuple(map(facts.shared, facts.shared_slots(before))),
            takes=(facts.WEIGHTS_LIVE, facts.WEIGHTS_REAL),
            pools={ledger.PARAMS: Size.NOTHING},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Drop them.

        Raises:
            EngineError: they are away already, or the engine stayed busy.
        """
        from kvpipe.engine import memory, weights

        change = weights.drop(ctx.engine)
        memory.give_back_host_memory()
        fields = {
            "num_params": change.num_params,
            "param_bytes": change.param_bytes,
            "freed_bytes": -change.changed_bytes,
        }
        freed = check_equal("drop_frees_params", change.param_bytes, -change.changed_bytes)
        return Result(fields, (freed,))
