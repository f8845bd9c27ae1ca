"""Empty the engine's prefix cache, so that nothing refers to the KV cache any more."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, IN_FLIGHT, PREFIX_CACHE
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase


class FlushCache(WorkerPhase):
    """Flush, on the scheduler's own thread, once the engine is idle."""

    effect = Effect(needs=(ENGINE,), forbids=(IN_FLIGHT,), removes=PREFIX_CACHE)

    @override
    def run(self, ctx: WorkerContext) -> Result:
        ctx.host_kv = None
        return Result({"flush_cache_output": ctx.engine.flush()})
