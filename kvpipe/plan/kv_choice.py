"""Choose what happens to the KV cache: plan each action, and take the smallest whose plan fits.

The choice is made before a step runs, and the plan of the run is the one with the chosen action. So
everything that a plan counts, including temporaries, counts here.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline.facts import KV_WRITTEN, own_kv_tokens
from kvpipe.pipeline.kv_choice import KEEP, SHRINK, decided, is_open, open_actions
from kvpipe.pipeline.ledger import KV
from kvpipe.pipeline.phase import Phase
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fit import KvCapacity, free_bytes, largest_own, why_not_fit
from kvpipe.plan.fold import Plan, PlannedStep, check_order, made_before
from kvpipe.plan.inputs import least_capacity
from kvpipe.plan.pages import whole_pages
from kvpipe.records.run import KvAction

Steps = Sequence[PlannedStep]


def ordered(config: Kvpipe) -> tuple[PlannedStep, ...]:
    """Return all steps of a config with their effects, as :func:`in_order` does."""
    return in_order(build_steps(config), config.engine.max_total_tokens)


def in_order(
    steps: Sequence[Phase], engine_tokens: int, made: Collection[str] = ()
) -> tuple[PlannedStep, ...]:
    """Return steps with their effects, in a checked order.

    Steps whose action the plan must choose stay open; their effects are those of the smallest
    action that the order allows, with a smaller cache as large as the engine's. ``made`` are facts
    that record earlier steps of the same run.

    Raises:
        InputError: the steps are wrong, or no action gives an order that holds.
    """
    actions = open_actions(steps)
    refused = None
    for action in actions:
        try:
            planned = check_order(decided(steps, action, engine_tokens), made)
        except InputError as error:
            refused = refused or error
        else:
            return tuple(
                replace(item, step=step) for item, step in zip(planned, steps, strict=True)
            )
    if refused:
        raise refused
    return check_order(steps, made)


@dataclass(frozen=True)
class _Tried:
    """An action that was planned; without a plan, the reason why this pipeline cannot take it."""

    action: str
    plan: Plan | None
    why_not: str | None


def choose(
    planned: Steps,
    kv: KvCapacity,
    make: Callable[[Steps], Plan],
    refuse: Callable[[Steps], None],
) -> Plan:
    """Return the plan of the steps, with the smallest action that fits where one is open.

    An action fits if its plan does and leaves the margin that a plan should (no warning). If none
    does, take the last whose plan fits at all, else the last that the order allows.

    Args:
        planned: the steps as :func:`ordered` returns them.
        kv: the engine's KV cache.
        make: plans steps in which nothing is open.
        refuse: raises an InputError for steps whose requests their KV cache does not hold.

    Raises:
        InputError: no action is possible.
    """
    steps = [item.step for item in planned]
    actions, made = open_actions(steps), made_before(planned)
    if not actions:
        return make(planned)

    def with_action(action: str, tokens: int) -> Plan:
        return make(check_order(decided(steps, action, tokens), made))

    def attempt(action: str) -> _Tried:
        try:
            tokens = least = least_capacity(kv.page_size)
            if action == SHRINK:
                tokens = largest_own(with_action(action, least), kv, least)
                if tokens < least:
                    raise InputError(f"no KV cache of {least} tokens has a place")
            plan = with_action(action, tokens)
            refuse(plan.steps)
        except InputError as error:
            return _Tried(action, None, str(error))
        return _Tried(action, plan, why_not_fit(plan.record) or plan.record.warning)

    tried = [attempt(action) for action in actions]
    chosen = _best(tried)
    if chosen.plan is None:
        raise InputError(str(chosen.why_not))
    first = next(idx for idx, step in enumerate(steps) if is_open(step))
    kept = next((each.plan for each in tried if each.action == KEEP), None)
    known = tuple(_costs(each, each is chosen, first, kept, kv) for each in tried)
    return replace(chosen.plan, record=replace(chosen.plan.record, kv_actions=known))


def _best(tried: Sequence[_Tried]) -> _Tried:
    roomy = [each for each in tried if each.why_not is None]
    possible = [each for each in tried if each.plan]
    fitting = [each for each in possible if each.plan and each.plan.record.fit.fits]
    return [*roomy[:1], *fitting[-1:], *possible[-1:], tried[0]][0]


def _costs(tried: _Tried, chosen: bool, first: int, kept: Plan | None, kv: KvCapacity) -> KvAction:
    """Return what an action costs; ``first`` is the position of the first step that takes it."""
    plan = tried.plan
    if plan is None:
        return KvAction(tried.action, chosen, tried.why_not)
    record, keeps = plan.record, tried.action == KEEP
    whole, left = (plan.ledgers[idx].sum_of(KV) for idx in (first - 1, first))
    own = own_kv_tokens(plan.steps[first].facts)
    return KvAction(
        tried.action,
        chosen,
        tried.why_not,
        fits=record.fit.fits,
        max_total_tokens=whole_pages(own or kv.tokens, kv.page_size) if left else 0,
        peak_phase=record.fit.peak_phase,
        peak_bytes=record.peak.max_device_bytes + record.fit.temp_bytes,
        free_bytes=free_bytes(record),
        freed_bytes=whole - left,
        remade_bytes=0 if keeps else whole + left,
        lost_tokens=0 if keeps else _lost_tokens(plan.steps, kept, kv.tokens),
    )


def _lost_tokens(steps: Steps, kept: Plan | None, capacity: int) -> int:
    """Return the most tokens that a cache which is kept would still hold when this one is back."""
    if kept is None:
        return 0
    away = False
    for item, other in zip(steps, kept.steps, strict=True):
        was, away = away, item.pools.get(KV) != other.pools.get(KV)
        if was and not away and KV_WRITTEN in other.facts:
            return capacity
    return 0


def described(actions: Sequence[KvAction]) -> list[str]:
    """Return one line for each action: whether it was chosen, the remaining cache, the cost."""
    return [
        f"kv={each.action}{' is chosen' if each.chosen else ''}: {_said(each)}" for each in actions
    ]


def _said(action: KvAction) -> str:
    if not action.peak_phase:
        return f"not possible: {action.why_not}"
    left = (
        f"a cache of {action.max_total_tokens:,} tokens" if action.max_total_tokens else "no cache"
    )
    parts = [
        f"leaves {left}",
        f"frees {action.freed_bytes:,} bytes and allocates {action.remade_bytes:,} each time",
        f"loses the prefixes of at most {action.lost_tokens:,} tokens",
        f"peaks at {action.peak_bytes:,} bytes a device in `{action.peak_phase}`",
        (action.why_not or f"{action.free_bytes:,} stay free") if action.fits else "does not fit",
    ]
    return ", ".join(parts)
