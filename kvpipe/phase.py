"""What a phase is: what it needs, what it leaves, its effect on the ledger, and how it runs.

A phase is a frozen dataclass whose fields are its options, so the config is checked against the
very class that runs. It is the one subclass of :class:`Phase` in ``phases/<use>.py``. Phases never
name each other: they meet through facts (:mod:`kvpipe.facts`) and the contexts
(:mod:`kvpipe.context`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvpipe.ledger import slot_pool

if TYPE_CHECKING:
    from kvpipe.context import ParentContext, WorkerContext
    from kvpipe.cycles import Cycle
    from kvpipe.records import Check
    from kvpipe.schema import Kvpipe


class Size(StrEnum):
    """A size that a phase can name before anything is loaded; abstract shapes resolve it."""

    NOTHING = "nothing"
    PARAMS = "params"
    KV = "kv"
    PROGRAM = "program"
    TRAINER_PROGRAM = "program:trainer"
    TRAINER_PARAMS = "trainer_params"
    TRAINER_GRADIENTS = "trainer_gradients"
    TRAINER_MOMENTS = "trainer_moments"


TRAINER_SETS = (Size.TRAINER_PARAMS, Size.TRAINER_GRADIENTS, Size.TRAINER_MOMENTS)
"""What a trainer holds. Each is in the slot of its own name."""


TRAIN_STEP, WEIGHT_SYNC = "train_step", "weight_sync"
TRAINER_PROGRAMS = (TRAIN_STEP, WEIGHT_SYNC)
"""The programs that a trainer runs: an update of its tree, and that tree's way into the engine."""


def trainer_pools(live: bool) -> dict[str, Size]:
    """Return what the trainer's slots hold while it is on the devices, or while it is not."""
    return {slot_pool(size): size if live else Size.NOTHING for size in TRAINER_SETS}


class Kind(StrEnum):
    """What a failure of a phase, or before it, means for the run.

    Attributes:
        CHANGES: it brings about what later phases build on; after its failure they are left out.
        MEASURES: it only looks; with ``runner.on_error=continue`` the run goes on after its failure.
        CLEANS: it lets go of something; it is run after any failure, and has to bear that what it
            lets go of was never there.
    """

    CHANGES = "changes"
    MEASURES = "measures"
    CLEANS = "cleans"


@dataclass(frozen=True)
class KvTokens:
    """The size of a KV cache of another capacity than ``engine.max_total_tokens``.

    Attributes:
        tokens: its capacity; the engine gives whole pages of it.
    """

    tokens: int


PoolSize = Size | KvTokens


@dataclass(frozen=True)
class Effect:
    """What a phase does to the state: declared, so that it can be folded without running it.

    Attributes:
        needs: facts that have to be true before it.
        forbids: facts that must not be true before it.
        leaves: facts that are true after it.
        takes: facts that are no longer true after it.
        pools: pool → the size that it holds after the phase.
        runs: the programs that it runs, by the names that a plan gives them; their temporaries
            count while it runs. Empty for a phase that runs the engine's steps, or none.
    """

    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    pools: Mapping[str, PoolSize] = field(default_factory=dict)
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a phase reports: fields for its record, and the checks that it made."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple["Check", ...] = ()


@dataclass(frozen=True)
class Phase:
    """Base of every phase.

    Attributes:
        step: name of the pipeline step, set when the step is built; not an option.
    """

    step: str
    # A subclass may refuse a value in __post_init__: an InputError that begins with the option.

    runs_in: ClassVar[str] = "worker"
    kind: ClassVar[Kind] = Kind.CHANGES

    @classmethod
    def defaults(cls, config: "Kvpipe") -> dict[str, Any]:
        """Return the option values that come from elsewhere in the config; a step overrides."""
        return {}

    def in_later_cycle(self, first: str, cycle: "Cycle") -> Self:
        """Return the phase as it is in a later cycle of a repeated stretch.

        Args:
            first: the step's name in the first cycle.
            cycle: the cycle that it is in.
        """
        return self

    def effect(self, before: frozenset[str]) -> Effect:
        """Declare what the phase needs and does, given the facts ``before`` it; no jax here."""
        raise NotImplementedError


@dataclass(frozen=True)
class WorkerPhase(Phase):
    """A phase that runs in the worker, beside the engine."""

    def run(self, ctx: "WorkerContext") -> Result:
        """Do it against the live engine."""
        raise NotImplementedError


@dataclass(frozen=True)
class ParentPhase(Phase):
    """A phase that runs in the parent, before the worker is started; it has no jax."""

    runs_in: ClassVar[str] = "parent"

    def run(self, ctx: "ParentContext") -> Result:
        """Do it in the parent process."""
        raise NotImplementedError
