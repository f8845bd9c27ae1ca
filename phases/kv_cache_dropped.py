"""Delete the KV cache's buffers while the engine stays alive."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class KvCacheDropped(WorkerPhase):
    """Drop the KV cache and check that exactly its bytes came free."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the KV cache away."""
        return Effect(
            needs=(facts.ENGINE, facts.KV_LIVE),
            forbids=(facts.KV_WRITTEN,),
            takes=(facts.KV_LIVE,),
            pools={ledger.KV: Size.NOTHING},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Drop it.

        Raises:
            EngineError: it is dropped already, or the engine stayed busy.
        """
        from kvpipe.engine import kv_cache, memory

        change = kv_cache.drop(ctx.engine)
        memory.give_back_host_memory()
        info = {
            "fused_bytes_total": change.fused_bytes_total,
            "fused_bytes_per_layer": change.fused_bytes_per_layer,
            "deleted_buffers": change.layers,
            "freed_bytes": -change.changed_bytes,
        }
        freed = check_equal("drop_frees_kv_bytes", change.fused_bytes_total, -change.changed_bytes)
        return Result({"drop_info": info}, (freed,))
