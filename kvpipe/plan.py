"""Fold the declared effects of the steps: the order check, then the ledger after each step.

Nothing is run and nothing is loaded here. :func:`check_order` needs no sizes and no jax;
:func:`plan_ledgers` needs the sizes that the engine's shapes give (:mod:`kvpipe.engine.shapes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpipe.errors import InputError
from kvpipe.facts import meaning
from kvpipe.ledger import Ledger, PerDevice
from kvpipe.phase import Effect, Phase, Size


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
