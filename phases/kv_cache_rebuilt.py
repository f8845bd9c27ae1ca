"""Build the dropped KV cache again, of the same shapes and shardings."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class KvCacheRebuilt(WorkerPhase):
    """Rebuild the KV cache and check that exactly its bytes came back."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the KV cache, empty."""
        return Effect(
            needs=(facts.ENGINE,),
            forbids=(facts.KV_LIVE, facts.KV_OFFLOADED),
            leaves=(facts.KV_LIVE,),
            pools={ledger.KV: Size.KV},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Rebuild it, and return when the buffers exist.

        Raises:
            EngineError: it is there, or the engine stayed busy.
        """
        from kvpipe.engine import kv_cache

        change = kv_cache.rebuild(ctx.engine)
        info = {
            "fused_bytes_total": change.fused_bytes_total,
            "fused_bytes_per_layer": change.fused_bytes_per_layer,
            "rebuilt_buffers": change.layers,
            "allocated_bytes": change.changed_bytes,
        }
        back = check_equal(
            "rebuild_brings_kv_bytes", change.fused_bytes_total, change.changed_bytes
        )
        return Result({"rebuild_info": info}, (back,))
