"""Make room in the KV cache's memory, as much as the plan needs: keep, shrink or drop the cache."""

from typing import override

from kvpipe.errors import PhaseError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, PREFIX_CACHE, kv_tokens, own_kv_tokens
from kvpipe.pipeline.kv_choice import KEEP, SHRINK, KvChoice
from kvpipe.pipeline.ledger import KV_ZEROS
from kvpipe.pipeline.phase import Effect, Result, freed, grown, together


class KvCacheYielded(KvChoice):
    """Yield memory; exactly the planned bytes must come free.

    A cache that is shrunk or dropped is flushed first.
    """

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        if self.kv == KEEP or self.choices:
            return Effect(needs=(ENGINE, KV_LIVE))
        was, tokens = own_kv_tokens(before), self.max_total_tokens
        own = (kv_tokens(was),) if was else ()
        if tokens is None:
            return Effect(needs=(ENGINE, KV_LIVE), removes=(KV_LIVE, *PREFIX_CACHE, *own))
        return Effect(
            needs=(ENGINE, KV_LIVE),
            adds=(kv_tokens(tokens),),
            removes=(*PREFIX_CACHE, *own),
            runs=(KV_ZEROS,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        if self.choices:
            raise PhaseError(f"{self.step}: no plan has chosen what happens to the KV cache")
        results = [Result({"kv_action": self.kv})]
        if self.kv != KEEP:
            ctx.host_kv = None
            ctx.engine.flush()
            change = kv_cache.drop(ctx.engine)
            results += [freed("drop_frees_kv_bytes", change, group="drop_info")]
        if self.kv == SHRINK:
            change = kv_cache.rebuild(ctx.engine, self.max_total_tokens)
            results += [grown("rebuild_brings_kv_bytes", change, group="rebuild_info")]
        return together(*results)
