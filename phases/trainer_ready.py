"""Make a trainer of the engine's model on the engine's devices: parameters, gradients, moments."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, WorkerPhase, trainer_pools
from kvpipe.records import check_equal


@dataclass(frozen=True)
class TrainerReady(WorkerPhase):
    """Begin with the model's files, or with a host tree; dtypes and optimizer are ``trainer``'s.

    Attributes:
        source: name of a host tree to take instead of the model's files.
    """

    source: str | None = None

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave a trainer beside the engine."""
        tree = (facts.host(self.source),) if self.source else ()
        return Effect(
            needs=(facts.ENGINE, *tree),
            forbids=(facts.TRAINER_LIVE, facts.TRAINER_OFFLOADED),
            leaves=(facts.TRAINER_LIVE,),
            pools=trainer_pools(live=True),
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Place the parameters and make zeros for the rest.

        Raises:
            InputError: the checkpoint is not there or damaged.
            EngineError: its weights are not complete, not of the engine's shapes or not finite.
        """
        from kvpipe.engine import memory, training
        from kvpipe.trainer.layout import lay_out
        from kvpipe.trainer.state import Trainer

        config, weights = ctx.config.trainer, self._weights(ctx)
        training.check(ctx.engine, weights)
        layout = lay_out(training.shapes(ctx.engine), training.mesh(ctx.engine), config)
        trainer = Trainer(layout, config)
        change = trainer.start(weights)
        ctx.trainer = trainer
        memory.give_back_host_memory()
        fields = {"trainer": asdict(config), "num_params": len(layout.params), **asdict(change)}
        grown = check_equal("trainer_takes_its_bytes", change.set_bytes, change.changed_bytes)
        return Result(fields, (grown,))

    def _weights(self, ctx: WorkerContext) -> Mapping[str, Any]:
        from kvpipe.checkpoints.mllm import HfView
        from kvpipe.checkpoints.safetensors import Checkpoint

        return HfView(ctx.host[self.source]) if self.source else Checkpoint.open(ctx.model_dir)
