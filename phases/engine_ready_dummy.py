"""Start the engine, with random weights unless ``engine.load_format`` says otherwise."""

from dataclasses import replace
from typing import override

from kvpipe.config.schema import DUMMY
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, JAX, KV_LIVE, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.ledger import Size
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, follows


class EngineReadyDummy(WorkerPhase):
    """Start the engine.

    Attributes:
        load_format: ``dummy`` for random weights, ``auto`` for the checkpoint's; follows
            ``engine.load_format``.
    """

    load_format: str = follows("engine.load_format")

    # While a random weight is drawn, its random bits may be sampled too.
    peak_is_checked = False

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        real = () if self.load_format == DUMMY else (WEIGHTS_REAL,)
        return Effect(
            needs=(JAX,),
            forbids=(ENGINE,),
            adds=(ENGINE, KV_LIVE, WEIGHTS_LIVE, *real),
            reads_weights=bool(real),
            peak=() if real else (Size.DUMMY_START,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import ready, sglang, weights

        config = ctx.config
        engine = replace(config.engine, load_format=self.load_format)
        ctx.started = sglang.start(engine, ctx.model_dir, config.runner.idle_timeout_s)
        weights.take_digests(ctx.started)
        return ready.result(ctx, engine)
