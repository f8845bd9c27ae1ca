"""Start the engine, with random weights unless ``engine.load_format`` says otherwise."""

from dataclasses import asdict, replace
from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, JAX, KV_LIVE, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, follows


class EngineReadyDummy(WorkerPhase):
    """Start the engine.

    Attributes:
        load_format: ``dummy`` for random weights, ``auto`` for the checkpoint's; follows
            ``engine.load_format``.
    """

    load_format: str = follows("engine.load_format")

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        real = () if self.load_format == "dummy" else (WEIGHTS_REAL,)
        return Effect(
            needs=(JAX,),
            forbids=(ENGINE,),
            adds=(ENGINE, KV_LIVE, WEIGHTS_LIVE, *real),
            reads_weights=bool(real),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import owners, sglang, weights

        config, model_dir = ctx.config, ctx.model_dir
        engine = replace(config.engine, load_format=self.load_format)
        ctx.started = sglang.start(engine, model_dir, config.runner.idle_timeout_s)
        weights.take_digests(ctx.started)
        ctx.owners = owners.Owners.when_ready(ctx.started)
        return Result(
            {
                **asdict(engine),
                "model_id": config.model.id,
                "model_dir": str(model_dir),
                "tp_size": ctx.started.runner.tp_size,
                "sgl_jax_version": ctx.started.version,
                "max_total_num_tokens": ctx.started.max_total_tokens,
                "num_model_state_leaves": weights.num_leaves(ctx.started),
                **ctx.started.proof.fields,
            }
        )
