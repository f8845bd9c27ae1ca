"""Base of the phases for which the plan chooses how much of the KV cache to free."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self, TypeGuard

from kvpipe.config.schema import AUTO, at_least, checked, one_of
from kvpipe.errors import InputError
from kvpipe.pipeline.phase import Phase, WorkerPhase

KEEP, SHRINK, DROP = KV_ACTIONS = ("keep", "shrink", "drop")
"""Actions on the KV cache while others need its memory, the smallest first."""


class KvChoice(WorkerPhase):
    """Keep, shrink or drop the KV cache.

    Attributes:
        kv: ``keep`` changes nothing, ``shrink`` makes a smaller cache in its place, which the engine can
            go on with, and ``drop`` leaves none; ``auto`` takes the first of these with which the plan
            fits, the same for all steps that say so.
        max_total_tokens: capacity of the smaller cache, in tokens; None is the largest that fits.
    """

    kv: str = checked(AUTO, one_of(AUTO, *KV_ACTIONS))
    max_total_tokens: int | None = checked(None, at_least(1))

    def __post_init__(self) -> None:
        if self.max_total_tokens is not None and self.kv in (KEEP, DROP):
            raise InputError(
                f"max_total_tokens is {self.max_total_tokens}, but kv={self.kv} makes no smaller "
                "cache; leave one of them out"
            )

    @property
    def choices(self) -> tuple[str, ...]:
        """The actions that the plan chooses from; empty if nothing is open."""
        if self.kv == AUTO:
            return KV_ACTIONS
        return (SHRINK,) if self.kv == SHRINK and self.max_total_tokens is None else ()

    def decided(self, action: str, tokens: int) -> Self:
        """Return the phase with the plan's choice; ``tokens`` are those of a smaller cache."""
        own = self.max_total_tokens or tokens
        return replace(self, kv=action, max_total_tokens=own if action == SHRINK else None)


def open_actions(steps: Sequence[Phase]) -> tuple[str, ...]:
    """Return the actions that all open steps can take, the smallest first; empty if none is open."""
    choices = [step.choices for step in steps if is_open(step)]
    return tuple(a for a in KV_ACTIONS if choices and all(a in each for each in choices))


def is_open(step: Phase) -> TypeGuard[KvChoice]:
    """Whether the plan must choose the action of a step."""
    return isinstance(step, KvChoice) and bool(step.choices)


def decided(steps: Sequence[Phase], action: str, tokens: int) -> tuple[Phase, ...]:
    """Return the steps with one action in all that are open."""
    return tuple(step.decided(action, tokens) if is_open(step) else step for step in steps)
