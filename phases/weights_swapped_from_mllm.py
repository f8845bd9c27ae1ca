"""Let the engine compute with the parameter set of a slot, and show that its output changed."""

from typing import override

from kvpipe.config.schema import at_least, checked
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, KV_WRITTEN, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.ledger import PROGRAM, Size
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.pipeline.swap_probe import SwapProbe


class WeightsSwappedFromMllm(WorkerPhase):
    """Swap the set in; the engine's old parameters are freed.

    Attributes:
        slot: name of the slot whose set is swapped in. It shares its arrays with the engine from then on,
            and so holds no bytes of its own.
        probe_tokens: greedy tokens to generate before and after the swap, which must differ;
            both are flushed. 0 skips it, for engines that have these weights already.
    """

    slot: str = "param_dict"
    probe_tokens: int = checked(8, at_least(0))

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        shared = facts.shared(self.slot)
        probed = (KV_LIVE, WEIGHTS_LIVE) if self.probe_tokens else ()
        return Effect(
            needs=(ENGINE, facts.slot(self.slot), *probed),
            forbids=(facts.IN_FLIGHT, KV_WRITTEN) if self.probe_tokens else (),
            adds=(WEIGHTS_LIVE, WEIGHTS_REAL, shared, *facts.stale(before)),
            removes=(facts.WEIGHTS_OFFLOADED, *(f for f in facts.shared_in(before) if f != shared)),
            pools={PROGRAM: Size.PROGRAM} if self.probe_tokens else {},
            new_tokens=self.probe_tokens,
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        probe = SwapProbe(ctx, self.probe_tokens)
        swap_s = weights.swap(ctx.engine, ctx.slots[self.slot])
        ctx.host_weights = None
        leaves, params = weights.num_leaves(ctx.engine), len(ctx.slots[self.slot])
        proof = ctx.engine.proof
        fields = {"num_model_state_leaves": leaves, "num_params": params, "swap_s": swap_s}
        return Result(fields | proof.fields, (*proof.checks, *probe.checks()))
