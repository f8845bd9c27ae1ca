"""Empty the engine's prefix cache, so that nothing refers to the KV cache any more."""

from dataclasses import dataclass

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, WorkerPhase


@dataclass(frozen=True)
class FlushCache(WorkerPhase):
    """Flush, on the scheduler's own thread, once the engine is idle."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Take the prefix cache's contents away."""
        return Effect(
            needs=(facts.ENGINE,), takes=(facts.KV_WRITTEN, facts.KV_STALE, facts.KV_OFFLOADED)
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Flush.

        Raises:
            EngineError: the engine stayed busy, or tokens are still held afterwards.
        """
        ctx.kv = None
        return Result({"flush_cache_output": ctx.engine.flush()})
