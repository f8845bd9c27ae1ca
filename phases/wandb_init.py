"""Begin the W&B run. The one phase of the parent: the engine's process never sees W&B."""

from typing import override

from kvpipe.pipeline.context import ParentContext
from kvpipe.pipeline.facts import WANDB
from kvpipe.pipeline.phase import Effect, ParentPhase, Result


class WandbInit(ParentPhase):
    """Begin the W&B run as ``tracking`` says; the record has the settings that are in force."""

    effect = Effect(adds=(WANDB,))

    @override
    def run(self, ctx: ParentContext) -> Result:
        return Result(ctx.start_tracking())
