"""Build the dropped KV cache again, of the same shapes and shardings or of another capacity."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import InputError
from kvpipe.phase import Effect, KvTokens, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class KvCacheRebuilt(WorkerPhase):
    """Rebuild the KV cache and check that exactly its bytes came back.

    Attributes:
        max_total_tokens: capacity of the cache from now on, in tokens; None is
            ``engine.max_total_tokens``. With another one XLA compiles the engine's steps again.
    """

    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_total_tokens is not None and self.max_total_tokens < 1:
            raise InputError(
                f"max_total_tokens: {self.max_total_tokens} tokens are no capacity of a KV cache"
            )

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the KV cache, empty."""
        tokens, was = self.max_total_tokens, facts.own_kv_tokens(before)
        own = (facts.kv_tokens(tokens),) if tokens else ()
        return Effect(
            needs=(facts.ENGINE,),
            forbids=(facts.KV_LIVE, facts.KV_OFFLOADED),
            leaves=(facts.KV_LIVE, *own),
            takes=(facts.kv_tokens(was),) if was else (),
            pools={ledger.KV: KvTokens(tokens) if tokens else Size.KV},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Rebuild it, and return when the buffers exist.

        Raises:
            EngineError: it is there, the engine stayed busy, or no request fits in the capacity.
        """
        from kvpipe.engine import kv_cache

        tokens = self.max_total_tokens or ctx.config.engine.max_total_tokens
        change = kv_cache.rebuild(ctx.engine, tokens)
        info = {
            "fused_bytes_total": change.fused_bytes_total,
            "fused_bytes_per_layer": change.fused_bytes_per_layer,
            "rebuilt_buffers": change.layers,
            "max_total_tokens": ctx.engine.max_total_tokens,
            "allocated_bytes": change.changed_bytes,
        }
        back = check_equal(
            "rebuild_brings_kv_bytes", change.fused_bytes_total, change.changed_bytes
        )
        return Result({"rebuild_info": info}, (back,))
