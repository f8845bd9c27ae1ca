"""Begin the W&B run. The one phase of the parent: the engine's process never sees W&B."""

from dataclasses import dataclass

from kvpipe import facts
from kvpipe.context import ParentContext
from kvpipe.phase import Effect, ParentPhase, Result


@dataclass(frozen=True)
class WandbInit(ParentPhase):
    """Begin the W&B run as ``tracking`` says; what is really in force stands in the record."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave a W&B run."""
        return Effect(leaves=(facts.WANDB,))

    def run(self, ctx: ParentContext) -> Result:
        """Begin it.

        Raises:
            TrackingError: W&B cannot be had and the config allows no fallback.
        """
        return Result(ctx.start_tracking())
