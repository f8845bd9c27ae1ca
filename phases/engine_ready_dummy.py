"""Start the engine, with random weights unless ``engine.load_format`` says otherwise."""

from dataclasses import asdict, dataclass, replace

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import InputError
from kvpipe.phase import Effect, Result, Size, WorkerPhase
from kvpipe.schema import EngineConfig, Kvpipe


@dataclass(frozen=True)
class EngineReadyDummy(WorkerPhase):
    """Start the engine.

    Attributes:
        load_format: ``dummy`` for random weights, ``auto`` for the checkpoint's; follows ``engine.load_format``.
    """

    load_format: str

    def __post_init__(self) -> None:
        try:
            EngineConfig(load_format=self.load_format)
        except InputError as error:
            raise InputError(str(error).removeprefix("engine.")) from None

    @classmethod
    def defaults(cls, config: Kvpipe) -> dict[str, str]:
        """Take the load format from the engine's options."""
        return {"load_format": config.engine.load_format}

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave an engine with parameters and a KV cache."""
        real = () if self.load_format == "dummy" else (facts.WEIGHTS_REAL,)
        return Effect(
            needs=(facts.JAX,),
            forbids=(facts.ENGINE,),
            leaves=(facts.ENGINE, facts.KV_LIVE, facts.WEIGHTS_LIVE, *real),
            pools={ledger.PARAMS: Size.PARAMS, ledger.KV: Size.KV},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Start it.

        Raises:
            InputError: the model is not there.
            EngineError: it did not start, or cut the KV cache's capacity down.
        """
        from kvpipe.engine import sglang, weights

        config = ctx.config
        engine = replace(config.engine, load_format=self.load_format)
        ctx.started = sglang.start(engine, ctx.model_dir, config.runner.idle_timeout_s)
        return Result(
            {
                **asdict(engine),
                "model_id": config.model.id,
                "model_dir": str(ctx.model_dir),
                "tp_size": ctx.started.runner.tp_size,
                "sgl_jax_version": ctx.started.version,
                "max_total_num_tokens": ctx.started.scheduler.max_total_num_tokens,
                "num_model_state_leaves": weights.num_leaves(ctx.started),
            }
        )
