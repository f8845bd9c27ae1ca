"""Make a trainer of the engine's model on the engine's devices: parameters, gradients, moments."""

from dataclasses import asdict
from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, TRAINER_LIVE, TRAINER_OFFLOADED, host
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase, grown


class TrainerReady(WorkerPhase):
    """Begin with the model's files, with a host tree or, in a resumed run, with the checkpoint.

    Dtypes and optimizer are ``trainer``'s.

    Attributes:
        source: name of a host tree to load instead of the model's files.
    """

    source: str | None = None

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(
            needs=(ENGINE, *((host(self.source),) if self.source else ())),
            forbids=(TRAINER_LIVE, TRAINER_OFFLOADED),
            adds=(TRAINER_LIVE,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import training
        from kvpipe.engine.forward import Forward
        from kvpipe.trainer import checkpoint
        from kvpipe.trainer.layout import lay_out
        from kvpipe.trainer.state import Trainer

        config = ctx.config.trainer
        layout = lay_out(training.shapes(ctx.engine), training.mesh(ctx.engine), config)
        forward = Forward.of_engine(ctx.engine) if config.learns else None
        trainer = Trainer(layout, config, forward)
        if ctx.config.resume_after is None:
            weights = ctx.hf_weights(self.source)
            training.check(ctx.engine, weights)
            change = trainer.start(weights)
        else:
            change = checkpoint.resume(trainer, ctx)
        ctx.made_trainer = trainer
        change = change.with_fields(trainer=asdict(config), num_params=len(layout.params))
        return grown("trainer_takes_its_bytes", change)
