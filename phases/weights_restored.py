"""Bring the engine's offloaded weights back to the devices."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, WEIGHTS_LIVE, WEIGHTS_OFFLOADED
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class WeightsRestored(WorkerPhase):
    """Restore the weights; exactly their bytes must come back."""

    effect = Effect(
        needs=(ENGINE, WEIGHTS_OFFLOADED), adds=(WEIGHTS_LIVE,), removes=(WEIGHTS_OFFLOADED,)
    )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        change = weights.restore(ctx.engine, ctx.offloaded_weights)
        ctx.host_weights = None
        return grown("restore_brings_params", change, *ctx.engine.proof.checks)
