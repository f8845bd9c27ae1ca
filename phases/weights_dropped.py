"""Free the engine's weights; it cannot generate until a swap brings others."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, WEIGHTS_LIVE, WEIGHTS_REAL, shared_in
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed


class WeightsDropped(WorkerPhase):
    """Drop the weights; exactly their bytes must come free."""

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(
            needs=(ENGINE, WEIGHTS_LIVE),
            forbids=shared_in(before),  # a slot that shares the arrays would keep their bytes
            removes=(WEIGHTS_LIVE, WEIGHTS_REAL),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        return freed("drop_frees_params", weights.drop(ctx.engine))
