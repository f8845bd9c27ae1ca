"""Bring an offloaded KV cache back to the devices, with the prefixes that it held."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import PhaseError
from kvpipe.phase import Effect, KvTokens, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class KvCacheRestored(WorkerPhase):
    """Restore the KV cache; the next generate finds its prefix in it again."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the KV cache as it was when it was offloaded."""
        tokens = facts.own_kv_tokens(before)
        return Effect(
            needs=(facts.ENGINE, facts.KV_OFFLOADED),
            leaves=(facts.KV_LIVE,),
            takes=(facts.KV_OFFLOADED,),
            pools={ledger.KV: KvTokens(tokens) if tokens else Size.KV},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Restore it.

        Raises:
            EngineError: the cache is there, or was flushed meanwhile.
        """
        from kvpipe.engine import kv_cache, lockstep

        if ctx.kv is None:
            raise PhaseError("there is no offloaded KV cache to restore")
        change = kv_cache.restore(ctx.engine, ctx.kv)
        info = {
            "fused_bytes_total": change.fused_bytes_total,
            "fused_bytes_per_layer": change.fused_bytes_per_layer,
            "rebuilt_buffers": change.layers,
            "allocated_bytes": change.changed_bytes,
            "restored_tokens": len(ctx.kv.rows),
            "restored_bytes": lockstep.total(ctx.kv.nbytes),
        }
        ctx.kv = None
        back = check_equal(
            "restore_brings_kv_bytes", change.fused_bytes_total, change.changed_bytes
        )
        return Result({"rebuild_info": info}, (back,))
