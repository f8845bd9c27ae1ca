"""Last part of every start of an engine, with or without weights."""

from dataclasses import asdict

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import owners, weights
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.phase import Result


def result(ctx: WorkerContext, config: EngineConfig) -> Result:
    """Name the owners of the started engine's arrays; return the fields of the record.

    ``config`` is the one that it was started with.
    """
    engine = ctx.engine
    ctx.owners = owners.Owners.when_ready(engine)
    return Result(
        {
            **asdict(config),
            "model_id": ctx.config.model.id,
            "model_dir": str(ctx.model_dir),
            "tp_size": engine.runner.tp_size,
            "sgl_jax_version": engine.version,
            "max_total_num_tokens": engine.max_total_tokens,
            "num_model_state_leaves": weights.num_leaves(engine),
            **engine.proof.fields,
        }
    )
