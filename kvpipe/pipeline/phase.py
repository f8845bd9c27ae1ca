"""The base of every phase: its declarations, its method ``run``, its result.

A phase is the one subclass of :class:`Phase` in its file. The base class makes it a frozen
dataclass; its fields are its options, so the config is checked against the very class that runs.
Phases never name each other: they meet through facts (:mod:`kvpipe.pipeline.facts`) and the contexts
(:mod:`kvpipe.pipeline.context`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, ClassVar, Self, cast, dataclass_transform, get_type_hints

from kvpipe.config.schema import Kvpipe
from kvpipe.pipeline.context import ParentContext, WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.facts import meaning
from kvpipe.pipeline.ledger import Change, PoolSize
from kvpipe.records.run import Check, check_equal
from kvpipe.suggest import nearest

_KEYS = {
    f"{section}.{each.name}": each
    for section, cls in get_type_hints(Kvpipe).items()
    if is_dataclass(cls)
    for each in fields(cls)
}


class OnFailure(StrEnum):
    """Consequence of a failure of a phase.

    Attributes:
        STOP: the run stops, because later phases build on this one.
        MAY_CONTINUE: the run continues if ``runner.on_error=continue``, else it stops. For phases
            that only measure.
        ALWAYS_RUN: the run stops, and the phase itself runs after a failure of any other. For phases
            that release something; it may never have been there.
    """

    STOP = "stop"
    MAY_CONTINUE = "may_continue"
    ALWAYS_RUN = "always_run"


@dataclass(frozen=True)
class Effect:
    """Effect of a phase on the state, declared so that it can be folded without running the phase.

    Attributes:
        needs: facts that must be true before it.
        forbids: facts that must be false before it.
        adds: facts that are true after it.
        removes: facts that are false after it.
        pools: pool → its size after the phase, for pools that do not follow from the facts
            (:func:`kvpipe.pipeline.facts.pools`).
        runs: the programs that it runs, by their names in a plan; their temporaries count while it
            runs. Empty for a phase that runs the engine's steps, or none.
        new_tokens: the most tokens that it generates for a prompt; 0 if it generates none.
        rolls_out: whether it generates for the prompts of rollouts, not for the one prompt.
        samples: number of samples of each of them.
        pauses_after: number of new tokens, of all samples together, after which it stops with samples
            half-way; 0 if it finishes them.
        reads_weights: whether it reads the files of the model's weights.
        peak: sizes of the arrays that it holds at its peak together with all that was there before;
            empty if no plan predicts its peak.
        reads_losses: whether it reads the losses of training steps.
    """

    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    pools: Mapping[str, PoolSize] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    new_tokens: int = 0
    rolls_out: bool = False
    samples: int = 0
    pauses_after: int = 0
    reads_weights: bool = False
    peak: tuple[PoolSize, ...] = ()
    reads_losses: bool = False

    def __post_init__(self) -> None:
        for name in ("needs", "forbids", "adds", "removes"):
            # A comma that is missing in ("engine",) would make each letter a fact.
            if not isinstance(named := getattr(self, name), tuple):
                raise TypeError(f"{name} is {named!r}, not a tuple; write ({named!r},)")
            for fact in named:
                meaning(fact)

    def after(self, before: frozenset[str]) -> frozenset[str]:
        """Return the facts after a phase with this effect."""
        return (before - frozenset(self.removes)) | frozenset(self.adds)


@dataclass(frozen=True)
class Result:
    """Result of a phase.

    Attributes:
        fields: fields for its record.
        checks: its checks.
        samples: the samples of a rollout, JSON-serialisable; they go to a file of their own.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    samples: Sequence[Mapping[str, Any]] = ()


def freed(check: str, change: Change, group: str | None = None) -> Result:
    """Return the result of a verb that freed arrays: exactly their bytes must have come free.

    The record gets the change's fields, below the key ``group`` if there is one.
    """
    fields = {group: change.fields} if group else change.fields
    return Result(fields, (check_equal(check, change.nbytes, change.freed_bytes),))


def grown(check: str, change: Change, *others: Check, group: str | None = None) -> Result:
    """Return the result of a verb that placed arrays: exactly their bytes must have been added.

    The bytes of arrays that they replaced are subtracted. The record gets the change's fields as
    for :func:`freed`, and the other checks too.
    """
    fields = {group: change.fields} if group else change.fields
    added = change.nbytes - change.replaced_bytes
    return Result(fields, (check_equal(check, added, change.changed_bytes), *others))


def together(*results: Result) -> Result:
    """Return the results of several verbs of one phase as one; none has a field of another."""
    fields = {key: value for result in results for key, value in result.fields.items()}
    return Result(fields, tuple(check for result in results for check in result.checks))


def follows(key: str) -> Any:
    """Return an option whose default and check are those of a config key, e.g. ``engine.dtype``."""
    if key not in _KEYS:
        raise ValueError(f"there is no config key {key!r}; {nearest(key, _KEYS)}")
    return field(metadata={**_KEYS[key].metadata, "follows": key})


@dataclass_transform(frozen_default=True)
class _Frozen:
    """Make every subclass a frozen dataclass."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True)(cls)


class Phase(_Frozen):
    """Base of every phase.

    A subclass declares ``effect``, or overrides :meth:`effect_given` where the effect depends on its
    options or on the facts before it. An option that is a :func:`kvpipe.config.schema.checked` field
    refuses wrong values when the step is built; ``__post_init__`` may refuse anything else, with an
    InputError that begins with the option's name.

    Attributes:
        step: name of the pipeline step, set when the step is built; not an option.
        effect: its effect, if that is always the same.
        on_failure: consequence of its failure.
        runs_in: the process that runs it.
        replaces: whether it takes the place of another phase of its name, e.g. of one of kvpipe's.
        peak_is_checked: whether the run is held to the planned peak inside the phase, if there is one.
    """

    step: str

    effect: ClassVar[Effect]
    on_failure: ClassVar[OnFailure] = OnFailure.STOP
    runs_in: ClassVar[str] = "worker"
    replaces: ClassVar[bool] = False
    peak_is_checked: ClassVar[bool] = True

    @classmethod
    def defaults(cls, config: Kvpipe) -> dict[str, Any]:
        """Return the values of the options that follow the config; a step overrides them."""
        keys = {each.name: each.metadata.get("follows") for each in fields(cls)}
        values = {name: attrgetter(key)(config) for name, key in keys.items() if key}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        """Return the phase as it is in a later cycle; ``first`` is its name in the first one."""
        return self

    def effect_given(self, before: frozenset[str]) -> Effect:
        """Return the effect, given the facts before the phase; no jax here."""
        return self.effect


class WorkerPhase(Phase):
    """A phase that runs in the worker, beside the engine."""

    def run(self, ctx: WorkerContext) -> Result:
        """Run the phase against the live engine."""
        raise NotImplementedError


class ParentPhase(Phase):
    """A phase that runs in the parent, before the worker is started; it has no jax."""

    runs_in = "parent"

    def run(self, ctx: ParentContext) -> Result:
        """Run the phase in the parent process."""
        raise NotImplementedError


def result_of(phase: WorkerPhase | ParentPhase, ctx: Any) -> Result:
    """Run a phase and return its result.

    Raises:
        TypeError: it returned something else.
    """
    result = cast("object", phase.run(ctx))
    if not isinstance(result, Result):
        raise TypeError(f"run returned {result!r}, not a Result")
    return result
