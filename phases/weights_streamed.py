"""Stream weights into the engine leaf by leaf: never a second set, on the devices or on the host."""

from typing import override

from kvpipe.config.schema import at_least, checked
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, WEIGHTS_LIVE, WEIGHTS_OFFLOADED, WEIGHTS_REAL
from kvpipe.pipeline.ledger import PROGRAM, Size
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown
from kvpipe.pipeline.swap_probe import SwapProbe


class WeightsStreamed(WorkerPhase):
    """Swap weights in from the model's files, or from a host tree; the prefix cache is flushed.

    Requests of a paused rollout stay in flight, and then it is not flushed.

    Attributes:
        source: name of a host tree to load instead of the model's files.
        probe_tokens: greedy tokens to generate before and after the swap, which must differ.
            0 skips it, for engines that have these weights already, or none.
    """

    source: str | None = None
    probe_tokens: int = checked(8, at_least(0))

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        tree = (facts.host(self.source),) if self.source else ()
        probed = (KV_LIVE, WEIGHTS_LIVE) if self.probe_tokens else ()
        new = () if WEIGHTS_LIVE in before else (Size.PARAMS,)
        not_probed = (facts.IN_FLIGHT,) if self.probe_tokens else ()
        stale, flushed = facts.flushed(before)
        return Effect(
            needs=(ENGINE, *tree, *probed),
            # A slot that shares the old arrays would keep them alive beside the new ones.
            forbids=(*not_probed, *facts.shared_in(before)),
            adds=(WEIGHTS_LIVE, WEIGHTS_REAL, *stale),
            removes=(*flushed, WEIGHTS_OFFLOADED),
            pools={PROGRAM: Size.PROGRAM} if self.probe_tokens else {},
            new_tokens=self.probe_tokens,
            reads_weights=self.source is None,
            peak=() if self.probe_tokens else (*new, Size.LEAF),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        probe = SwapProbe(ctx, self.probe_tokens)
        change = weights.stream(ctx.engine, ctx.hf_weights(self.source))
        ctx.exchanged_weights()
        proof = ctx.engine.proof.checks
        return grown("swap_leaves_one_set", change, *proof, *probe.checks())
