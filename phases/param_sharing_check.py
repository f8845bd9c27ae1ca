"""Check that the engine computes with the very arrays of a slot: all of them, not a sample."""

from typing import override

from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.phase import Effect, OnFailure, Result, WorkerPhase
from kvpipe.records.run import check_equal


class ParamSharingCheck(WorkerPhase):
    """Compare the engine's parameters with the slot's by identity.

    Attributes:
        slot: name of the slot that was swapped in.
    """

    slot: str = "param_dict"

    on_failure = OnFailure.MAY_CONTINUE

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(needs=(facts.slot(self.slot), facts.shared(self.slot)))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        held, current = ctx.slots[self.slot], weights.parameters(ctx.engine)
        apart = sorted(path for path, array in current.items() if held.get(path) is not array)
        shared = len(current) - len(apart)
        detail = f"not the engine's arrays: {apart}" if apart else ""
        fields = {"num_params": len(current), "results": {"shared": shared, "apart": apart}}
        return Result(fields, (check_equal("params_are_shared", len(current), shared, detail),))
