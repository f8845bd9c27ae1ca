"""Delete the KV cache's buffers while the engine stays alive."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, IN_FLIGHT, KV_LIVE, KV_WRITTEN
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed


class KvCacheDropped(WorkerPhase):
    """Drop the KV cache; exactly its bytes must come free."""

    effect = Effect(needs=(ENGINE, KV_LIVE), forbids=(IN_FLIGHT, KV_WRITTEN), removes=(KV_LIVE,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        return freed("drop_frees_kv_bytes", kv_cache.drop(ctx.engine), group="drop_info")
