"""Stream weights into the engine leaf by leaf: never a second set, on the devices or on the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import InputError
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal
from kvpipe.swap_probe import SwapProbe


@dataclass(frozen=True)
class WeightsStreamed(WorkerPhase):
    """Swap weights in from the model's files, or from a host tree; the prefix cache is flushed.

    Attributes:
        source: name of a host tree to take instead of the model's files.
        probe_tokens: greedy tokens to generate before and after the swap, which have to differ.
            0 skips it, for engines that have these weights already, or none.
    """

    source: str | None = None
    probe_tokens: int = 8

    def __post_init__(self) -> None:
        if self.probe_tokens < 0:
            raise InputError(f"probe_tokens is {self.probe_tokens}, it has to be at least 0")

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave real weights and an empty prefix cache; the parameters take what they took."""
        tree = (facts.host(self.source),) if self.source else ()
        probed = (facts.KV_LIVE, facts.WEIGHTS_LIVE) if self.probe_tokens else ()
        return Effect(
            needs=(facts.ENGINE, *tree, *probed),
            # A slot that shares the old arrays would keep them alive beside the new ones.
            forbids=tuple(map(facts.shared, facts.shared_slots(before))),
            leaves=(facts.WEIGHTS_LIVE, facts.WEIGHTS_REAL),
            takes=(
                facts.KV_WRITTEN,
                facts.KV_STALE,
                facts.KV_OFFLOADED,
                facts.WEIGHTS_OFFLOADED,
            ),
            pools={
                ledger.PARAMS: Size.PARAMS,
                **({ledger.PROGRAM: Size.PROGRAM} if self.probe_tokens else {}),
            },
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Stream.

        Raises:
            InputError: the checkpoint is not there or damaged.
            EngineError: the weights are not complete, not of the engine's shapes or not finite;
                the engine keeps its old ones.
        """
        import time

        from kvpipe.engine import memory, weights

        probe = SwapProbe(ctx, self.probe_tokens)
        held = weights.live_bytes(ctx.engine)
        began = time.monotonic()
        change = weights.stream(ctx.engine, self._weights(ctx))
        swap_s = time.monotonic() - began
        ctx.kv = ctx.weights = None
        memory.give_back_host_memory()
        fields = {
            "num_model_state_leaves": weights.num_leaves(ctx.engine),
            "num_params": change.num_params,
            "param_bytes": change.param_bytes,
            "swap_s": round(swap_s, 6),
        }
        grown = check_equal("swap_leaves_one_set", change.param_bytes - held, change.changed_bytes)
        return Result(fields, (grown, *probe.checks()))

    def _weights(self, ctx: WorkerContext) -> Mapping[str, Any]:
        from kvpipe.checkpoints.mllm import HfView
        from kvpipe.checkpoints.safetensors import Checkpoint

        return HfView(ctx.host[self.source]) if self.source else Checkpoint.open(ctx.model_dir)
