"""Offload the engine's weights to host memory; the devices keep none of them."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, WEIGHTS_LIVE, WEIGHTS_OFFLOADED, shared_in
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed


class WeightsOffloaded(WorkerPhase):
    """Offload the weights; exactly their bytes must come free. The prefix cache stays valid."""

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(
            needs=(ENGINE, WEIGHTS_LIVE),
            forbids=shared_in(before),  # a slot that shares the arrays would keep their bytes
            adds=(WEIGHTS_OFFLOADED,),
            removes=(WEIGHTS_LIVE,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        change, ctx.host_weights = weights.offload(ctx.engine)
        return freed("offload_frees_params", change)
