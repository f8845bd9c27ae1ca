"""The option of the phases that are about the samples of an earlier rollout."""

from dataclasses import replace
from typing import Self, override

from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.phase import WorkerPhase


class AboutRollout(WorkerPhase):
    """Base of the phases about an earlier rollout.

    Attributes:
        of: name of the rollout's step, of the same cycle if both are repeated; null is the paused one,
            for a phase that takes it.
    """

    of: str | None = "rollout"

    @override
    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        return replace(self, of=self.of and cycle.name(self.of))
