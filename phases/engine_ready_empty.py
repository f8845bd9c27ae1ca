"""Start the engine without weights; it refuses to generate until some are streamed or swapped in."""

from typing import override

from kvpipe.config.schema import DUMMY
from kvpipe.errors import InputError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, JAX, KV_LIVE
from kvpipe.pipeline.ledger import Size
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, follows


class EngineReadyEmpty(WorkerPhase):
    """Start the engine; its devices hold the KV cache and no weights, not for a moment.

    Attributes:
        load_format: must be ``dummy``, since nothing is loaded; follows ``engine.load_format``.
        precompile: must be false, since compiling runs the model; follows ``engine.precompile``.
    """

    load_format: str = follows("engine.load_format")
    precompile: bool = follows("engine.precompile")

    effect = Effect(needs=(JAX,), forbids=(ENGINE,), adds=(ENGINE, KV_LIVE), peak=(Size.KV,))

    def __post_init__(self) -> None:
        for name, value, needed in (
            ("load_format", self.load_format, DUMMY),
            ("precompile", self.precompile, False),
        ):
            if value != needed:
                raise InputError(
                    f"{name} is {value!r}, but this step starts the engine without weights; "
                    "'engine_ready_dummy' starts it with some"
                )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import empty_start, ready

        config = ctx.config
        ctx.started = empty_start.start(config.engine, ctx.model_dir, config.runner.idle_timeout_s)
        return ready.result(ctx, config.engine)
