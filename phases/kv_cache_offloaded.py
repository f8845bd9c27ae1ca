"""Copy the used part of the KV cache to the host and delete its buffers."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, KV_OFFLOADED
from kvpipe.pipeline.ledger import KV_TAKE
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed


class KvCacheOffloaded(WorkerPhase):
    """Offload the KV cache; the prefix tree stays, so that a restore brings every prefix back.

    The tokens of a paused rollout's requests go with it.
    """

    effect = Effect(
        needs=(ENGINE, KV_LIVE), adds=(KV_OFFLOADED,), removes=(KV_LIVE,), runs=(KV_TAKE,)
    )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        change, ctx.host_kv = kv_cache.offload(ctx.engine)
        return freed("offload_frees_kv_bytes", change, group="drop_info")
