"""Put the used part of the KV cache aside on the host and delete its buffers."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class KvCacheOffloaded(WorkerPhase):
    """Offload the KV cache; the prefix tree stays, so that a restore brings every prefix back."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the KV cache from the devices; its contents are not lost."""
        return Effect(
            needs=(facts.ENGINE, facts.KV_LIVE),
            leaves=(facts.KV_OFFLOADED,),
            takes=(facts.KV_LIVE,),
            pools={ledger.KV: Size.NOTHING},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Offload it.

        Raises:
            EngineError: it is away already, or the engine stayed busy.
        """
        from kvpipe.engine import kv_cache, lockstep, memory

        change, ctx.kv = kv_cache.offload(ctx.engine)
        memory.give_back_host_memory()
        info = {
            "fused_bytes_total": change.fused_bytes_total,
            "fused_bytes_per_layer": change.fused_bytes_per_layer,
            "deleted_buffers": change.layers,
            "freed_bytes": -change.changed_bytes,
            "offloaded_tokens": len(ctx.kv.rows),
            "offloaded_bytes": lockstep.total(ctx.kv.nbytes),
        }
        freed = check_equal(
            "offload_frees_kv_bytes", change.fused_bytes_total, -change.changed_bytes
        )
        return Result({"drop_info": info}, (freed,))
