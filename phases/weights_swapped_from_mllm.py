"""Let the engine compute with the parameter set of a slot, and show that its output changed."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import InputError
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.swap_probe import SwapProbe


@dataclass(frozen=True)
class WeightsSwappedFromMllm(WorkerPhase):
    """Swap the set in; the engine's old parameters are freed.

    Attributes:
        slot: name of the slot whose set is swapped in. It shares its arrays with the engine from then on,
            and so holds no bytes of its own.
        probe_tokens: greedy tokens to generate before and after the swap, which have to differ;
            both are flushed. 0 skips it, for engines that have these weights already.
    """

    slot: str = "param_dict"
    probe_tokens: int = 8

    def __post_init__(self) -> None:
        if self.probe_tokens < 0:
            raise InputError(f"probe_tokens is {self.probe_tokens}, it has to be at least 0")

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave real weights, and a stale prefix cache if it was in use."""
        others = [name for name in facts.shared_slots(before) if name != self.slot]
        unshared = {ledger.slot_pool(n): Size.PARAMS for n in others if facts.slot(n) in before}
        stale = (facts.KV_STALE,) if facts.KV_WRITTEN in before else ()
        probe_needs = (facts.KV_LIVE, facts.WEIGHTS_LIVE) if self.probe_tokens else ()
        return Effect(
            needs=(facts.ENGINE, facts.slot(self.slot), *probe_needs),
            forbids=(facts.KV_WRITTEN,) if self.probe_tokens else (),
            leaves=(facts.WEIGHTS_LIVE, facts.WEIGHTS_REAL, facts.shared(self.slot), *stale),
            takes=(facts.WEIGHTS_OFFLOADED, *map(facts.shared, others)),
            pools={
                **unshared,
                ledger.slot_pool(self.slot): Size.NOTHING,
                ledger.PARAMS: Size.PARAMS,
                **({ledger.PROGRAM: Size.PROGRAM} if self.probe_tokens else {}),
            },
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Swap.

        Raises:
            EngineError: the set is not complete or not of the engine's shapes.
        """
        import time

        from kvpipe.engine import weights

        probe = SwapProbe(ctx, self.probe_tokens)
        began = time.monotonic()
        weights.swap(ctx.engine, ctx.slots[self.slot])
        swap_s = time.monotonic() - began
        ctx.weights = None
        fields = {
            "num_model_state_leaves": weights.num_leaves(ctx.engine),
            "num_params": len(ctx.slots[self.slot]),
            "swap_s": round(swap_s, 6),
        }
        return Result(fields, probe.checks())
