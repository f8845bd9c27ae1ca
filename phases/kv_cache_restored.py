"""Bring an offloaded KV cache back to the devices, with the prefixes that it held."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, KV_OFFLOADED
from kvpipe.pipeline.ledger import KV_PUT, KV_ZEROS
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class KvCacheRestored(WorkerPhase):
    """Restore the KV cache; the next generate finds its prefix in it again."""

    effect = Effect(
        needs=(ENGINE, KV_OFFLOADED),
        adds=(KV_LIVE,),
        removes=(KV_OFFLOADED,),
        runs=(KV_ZEROS, KV_PUT),
    )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        change = kv_cache.restore(ctx.engine, ctx.offloaded_kv)
        ctx.host_kv = None
        return grown("restore_brings_kv_bytes", change, group="rebuild_info")
