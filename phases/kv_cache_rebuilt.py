"""Build the dropped KV cache again, of the same shapes and shardings or of another capacity."""

from typing import override

from kvpipe.config.schema import at_least, checked
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, KV_OFFLOADED, kv_tokens, own_kv_tokens
from kvpipe.pipeline.ledger import KV_ZEROS
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class KvCacheRebuilt(WorkerPhase):
    """Rebuild the KV cache; exactly its bytes must come back.

    Attributes:
        max_total_tokens: capacity of the cache from now on, in tokens; None is
            ``engine.max_total_tokens``. With another one XLA compiles the engine's steps again.
    """

    max_total_tokens: int | None = checked(None, at_least(1))

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        tokens, was = self.max_total_tokens, own_kv_tokens(before)
        return Effect(
            needs=(ENGINE,),
            forbids=(KV_LIVE, KV_OFFLOADED),
            adds=(KV_LIVE, kv_tokens(tokens)) if tokens else (KV_LIVE,),
            removes=(kv_tokens(was),) if was else (),
            runs=(KV_ZEROS,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        tokens = self.max_total_tokens or ctx.config.engine.max_total_tokens
        change = kv_cache.rebuild(ctx.engine, tokens)
        return grown("rebuild_brings_kv_bytes", change, group="rebuild_info")
