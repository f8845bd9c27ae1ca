"""Bring the KV cache that ``kv_cache_yielded`` changed back to ``engine.max_total_tokens``."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import (
    ENGINE,
    KV_LIVE,
    KV_OFFLOADED,
    PREFIX_CACHE,
    kv_tokens,
    own_kv_tokens,
)
from kvpipe.pipeline.ledger import KV_ZEROS
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, freed, grown, together
from kvpipe.plan.pages import whole_pages


class KvCacheReclaimed(WorkerPhase):
    """Reclaim the memory; nothing is done if the cache was kept, and a smaller one is flushed."""

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        own = own_kv_tokens(before)
        if KV_LIVE in before and own is None:
            return Effect(needs=(ENGINE,))
        return Effect(
            needs=(ENGINE,),
            forbids=(KV_OFFLOADED,),
            adds=(KV_LIVE,),
            removes=(*PREFIX_CACHE, kv_tokens(own)) if own else (),
            runs=(KV_ZEROS,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        config, results = ctx.config.engine, []
        if kv_cache.buffers(ctx.engine):
            whole = whole_pages(config.max_total_tokens, config.page_size)
            if ctx.engine.max_total_tokens == whole:
                return Result()
            ctx.engine.flush()
            change = kv_cache.drop(ctx.engine)
            results += [freed("drop_frees_kv_bytes", change, group="drop_info")]
        change = kv_cache.rebuild(ctx.engine, config.max_total_tokens)
        results += [grown("rebuild_brings_kv_bytes", change, group="rebuild_info")]
        return together(*results)
