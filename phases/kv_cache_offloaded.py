"""Copy the used part of the KV cache to the host and delete its buffers."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, KV_OFFLOADED
from kvpipe.pipeline.ledger import KV_TAKE
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed, together
from kvpipe.records.run import check_equal


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

        change, kept = kv_cache.offload(ctx.engine)
        ctx.host_kv = kept
        held = check_equal("offload_holds_used_tokens", len(kept.rows), kept.held_tokens)
        return together(
            freed("offload_frees_kv_bytes", change, group="drop_info"), Result(checks=(held,))
        )
