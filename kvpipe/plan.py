"""Fold the declared effects of the steps: the order check, then the ledger after each step.

Nothing is run and nothing is loaded here. :func:`check_order` needs no sizes and no jax;
:func:`plan_ledgers` needs the sizes that the engine's shapes give (:mod:`kvpipe.engine.shapes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpipe.errors import InputError
from kvpipe.facts import meaning
from kvpipe.ledger import KV, Ledger, PerDevice
from kvpipe.phase import Effect, Phase, Size
from kvpipe.records import Fit, PlannedPhase


@dataclass(frozen=True)
class PlannedStep:
    """A step with what it declares at its place of the pipeline.

    Attributes:
        step: the step.
        effect: its effect, given the facts before it.
        facts: what is true after it.
    """

    step: Phase
    effect: Effect
    facts: frozenset[str]


@dataclass(frozen=True)
class KvCapacity:
    """The KV cache that the ledgers were made with.

    Attributes:
        device_bytes: bytes that it takes on one device.
        tokens: its capacity, a multiple of the page size.
        page_size: tokens in a page.
    """

    device_bytes: int
    tokens: int
    page_size: int


def check_order(steps: Sequence[Phase]) -> tuple[PlannedStep, ...]:
    """Fold the effects over the steps.

    Raises:
        InputError: a step needs what is not there, or forbids what is; the message names the step,
            the reason, the step that is to blame and what would be right.
    """
    facts: frozenset[str] = frozenset()
    left_by: dict[str, str] = {}
    taken_by: dict[str, str] = {}
    planned = []
    for step in steps:
        effect = step.effect(facts)
        for fact in effect.needs:
            if fact not in facts:
                raise InputError(_missing(step.step, fact, taken_by.get(fact)))
        for fact in effect.forbids:
            if fact in facts:
                raise InputError(_forbidden(step.step, fact, left_by[fact]))
        left_by |= dict.fromkeys(effect.leaves, step.step)
        taken_by |= dict.fromkeys(effect.takes, step.step)
        facts = (facts - frozenset(effect.takes)) | frozenset(effect.leaves)
        planned.append(PlannedStep(step, effect, facts))
    return tuple(planned)


def plan_ledgers(
    planned: Sequence[PlannedStep], sizes: Mapping[Size, PerDevice], devices: int
) -> tuple[Ledger, ...]:
    """Return the ledger after each step, from the size of a parameter set and of the KV cache.

    Args:
        planned: the checked steps.
        sizes: bytes on each device for each size that a phase can name.
        devices: number of devices of the mesh.
    """
    nothing: PerDevice = (0,) * devices
    ledger = Ledger(devices)
    ledgers = []
    for item in planned:
        for pool, size in item.effect.pools.items():
            held = nothing if size is Size.NOTHING else sizes[size]
            ledger = ledger.with_pool(pool, held)
        ledgers.append(ledger)
    return tuple(ledgers)


def planned_phases(
    planned: Sequence[PlannedStep], ledgers: Sequence[Ledger]
) -> tuple[PlannedPhase, ...]:
    """Return the ledgers as records."""
    return tuple(
        PlannedPhase(
            name=item.step.step,
            pools=ledger.totals(),
            total_bytes=ledger.total_bytes,
            max_device_bytes=max(ledger.per_device),
        )
        for item, ledger in zip(planned, ledgers, strict=True)
    )


def judge(
    planned: Sequence[PlannedStep],
    ledgers: Sequence[Ledger],
    hbm_bytes: int,
    kv: KvCapacity,
) -> Fit:
    """Return whether every ledger fits devices of ``hbm_bytes`` bytes, and which is the fullest.

    The largest capacity that fits is exact: a device's share of the KV cache is proportional to
    tokens + page size, and nothing else in a ledger depends on the tokens. It is 0 if no capacity
    would help.
    """
    fullest = [max(ledger.per_device, default=0) for ledger in ledgers]
    peak = max(range(len(fullest)), key=fullest.__getitem__)
    per_token = kv.device_bytes // (kv.tokens + kv.page_size)
    loads = [
        (total, held)
        for ledger in ledgers
        for total, held in zip(ledger.per_device, ledger.of(KV), strict=True)
    ]
    too_full_without_kv = any(total > hbm_bytes for total, held in loads if not held)
    room = min((hbm_bytes - total + held for total, held in loads if held), default=hbm_bytes)
    pages = (room // per_token - kv.page_size) // kv.page_size
    return Fit(
        fits=fullest[peak] <= hbm_bytes,
        hbm_bytes=hbm_bytes,
        peak_phase=planned[peak].step.step,
        max_total_tokens=0 if too_full_without_kv else max(0, pages * kv.page_size),
    )


def _missing(step: str, fact: str, taken_by: str | None) -> str:
    means = meaning(fact)
    why = f"step {taken_by!r} took it away" if taken_by else "no step before it provides it"
    return f"pipeline: step {step!r} needs {means.what}, but {why}; {means.if_missing}"


def _forbidden(step: str, fact: str, left_by: str) -> str:
    means = meaning(fact)
    return (
        f"pipeline: step {step!r} must not meet {means.what}, which step {left_by!r} left; "
        f"{means.if_present}"
    )
