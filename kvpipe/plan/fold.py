"""Fold the declared effects of the steps: the order check, then the ledger after each step.

Nothing is run and nothing is loaded here. :func:`check_order` needs no sizes and no jax;
:func:`plan_ledgers` needs the sizes that the engine's shapes give (:mod:`kvpipe.engine.shapes`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvpipe.errors import InputError
from kvpipe.pipeline.facts import changed_pools, is_history, meaning, remedy
from kvpipe.pipeline.ledger import PADDING, KvTokens, Ledger, PerDevice, PoolSize, Size
from kvpipe.pipeline.phase import Effect, Phase
from kvpipe.pipeline.phase_files import effect_of
from kvpipe.records.run import PlannedPhase, RunPlanned


@dataclass(frozen=True)
class PlannedStep:
    """A step with its effect at its place in the pipeline.

    Attributes:
        step: the step.
        effect: its effect, given the facts before it.
        facts: the facts after it, without those that record that a step has run.
        pools: pool → its size after the step; others have held nothing so far.
    """

    step: Phase
    effect: Effect
    facts: frozenset[str]
    pools: Mapping[str, PoolSize]


@dataclass(frozen=True)
class Plan:
    """A plan as a record, and the exact ledger after each step, per device.

    Attributes:
        record: the plan as a record.
        ledgers: the ledger after each step.
        steps: its steps, with every open action decided.
    """

    record: RunPlanned
    ledgers: tuple[Ledger, ...]
    steps: tuple[PlannedStep, ...]


def check_order(steps: Sequence[Phase], made: Collection[str] = ()) -> tuple[PlannedStep, ...]:
    """Fold the effects over the steps.

    Args:
        steps: the steps.
        made: facts that record earlier steps of the same run.

    Raises:
        InputError: a step needs a fact that is false, or forbids one that is true; the message names
            the step, the fact, the step that caused it and what would be right.
    """
    facts: frozenset[str] = frozenset()
    # Apart from the facts, which each step copies, so that the time is linear in the steps.
    history = set(made)
    pools: dict[str, PoolSize] = {}
    added_by: dict[str, str] = {}
    removed_by: dict[str, str] = {}
    planned = []
    for step in steps:
        effect = effect_of(step, facts)
        for fact in effect.needs:
            if fact not in facts and fact not in history:
                raise InputError(_missing(step.step, fact, facts, removed_by.get(fact)))
        for fact in effect.forbids:
            if fact in facts or fact in history:
                raise InputError(_forbidden(step.step, fact, added_by[fact]))
        added_by |= dict.fromkeys(effect.adds, step.step)
        removed_by |= dict.fromkeys(effect.removes, step.step)
        history |= set(filter(is_history, effect.adds))
        history -= set(effect.removes)
        before, facts = facts, effect.after(facts) - history
        changed = {**changed_pools(before, facts), **effect.pools}
        if not changed.items() <= pools.items():
            pools = {**pools, **changed}
        planned.append(PlannedStep(step, effect, facts, pools))
    return tuple(planned)


def made_before(planned: Sequence[PlannedStep]) -> set[str]:
    """Return the facts about single steps that steps need, and that none of them adds."""
    needed = {fact for item in planned for fact in item.effect.needs if is_history(fact)}
    return needed.difference(*(item.effect.adds for item in planned))


def kv_capacities(planned: Sequence[PlannedStep]) -> frozenset[int]:
    """Return the capacities in tokens, other than ``engine.max_total_tokens``, of the KV cache."""
    held = (size for item in planned for size in item.pools.values())
    return frozenset(size.tokens for size in held if isinstance(size, KvTokens))


def plan_ledgers(
    planned: Sequence[PlannedStep],
    sizes: Mapping[PoolSize, PerDevice],
    devices: int,
    padding: Mapping[PoolSize, PerDevice] | None = None,
) -> tuple[Ledger, ...]:
    """Return the ledger after each step, given the bytes on each device for each size of a pool.

    ``padding`` has the bytes that the devices give beyond those; None if they pad nothing.
    """
    nothing: PerDevice = (0,) * devices
    ledgers = []
    for item in planned:
        ledger = Ledger(devices)
        padded: list[PerDevice] = [nothing]
        for pool, size in item.pools.items():
            held = nothing if size is Size.NOTHING else sizes[size]
            ledger = ledger.with_pool(pool, held)
            padded.append((padding or {}).get(size, nothing))
        ledgers.append(ledger.with_pool(PADDING, tuple(map(sum, zip(*padded, strict=True)))))
    return tuple(ledgers)


def plan_peaks(
    planned: Sequence[PlannedStep],
    ledgers: Sequence[Ledger],
    given: Mapping[PoolSize, PerDevice],
) -> tuple[int, ...]:
    """Return the most bytes on a device while a step works; 0 where its effect has no peak.

    What is there after the step may be more: see its ledger.

    ``given`` are the bytes that each device gives each size.
    """
    peaks = []
    before: PerDevice = (0,) * ledgers[0].devices if ledgers else ()
    for item, ledger in zip(planned, ledgers, strict=True):
        held = map(sum, zip(before, *(given[size] for size in item.effect.peak), strict=True))
        peaks.append(max(held) if item.effect.peak else 0)
        before = ledger.per_device
    return tuple(peaks)


def planned_phases(
    planned: Sequence[PlannedStep],
    ledgers: Sequence[Ledger],
    peaks: Sequence[int] | None = None,
    temporaries: Sequence[int] | None = None,
) -> tuple[PlannedPhase, ...]:
    """Return the ledgers as records, with peaks and temporaries of each step if they are known."""
    none = [0] * len(ledgers)
    sizes = zip(peaks or none, temporaries or none, strict=True)
    return tuple(
        PlannedPhase(
            name=item.step.step,
            pools=ledger.totals(),
            total_bytes=ledger.total_bytes,
            max_device_bytes=max(ledger.per_device),
            peak_device_bytes=peak and max(peak, *ledger.per_device),
            temp_bytes=temp_bytes,
        )
        for item, ledger, (peak, temp_bytes) in zip(planned, ledgers, sizes, strict=True)
    )


def _missing(step: str, fact: str, facts: frozenset[str], removed_by: str | None) -> str:
    why = f"step {removed_by!r} removed it" if removed_by else "no step before it provides it"
    return f"pipeline: step {step!r} needs {meaning(fact).what}, but {why}; {remedy(fact, facts)}"


def _forbidden(step: str, fact: str, added_by: str) -> str:
    means = meaning(fact)
    return (
        f"pipeline: step {step!r} requires {means.what} to be absent, but step {added_by!r} "
        f"created it; {means.if_present}"
    )
