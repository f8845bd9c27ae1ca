"""What a change costs: two plans of each experiment, before and after, as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe.records import RunPlanned
from kvpipe.report.config_changes import ABSENT, changes_table, config_changes
from kvpipe.report.plan import markdown_table, peak_of, verdict


@dataclass(frozen=True)
class Planned:
    """An experiment on one side of a comparison.

    Attributes:
        config: its composed config, as plain values.
        plan: its plan.
    """

    config: Mapping[str, Any]
    plan: RunPlanned


@dataclass(frozen=True)
class Change:
    """An experiment before and after; None where it does not exist.

    Attributes:
        experiment: its name.
        before, after: the two sides.
    """

    experiment: str
    before: Planned | None
    after: Planned | None

    @property
    def peak_growth_bytes(self) -> int:
        """Bytes that the peak of a device grew by; 0 for an experiment that is new or gone."""
        if self.before is None or self.after is None:
            return 0
        return _peak_bytes(self.after) - _peak_bytes(self.before)

    def excess(self, budget_bytes: int) -> str | None:
        """Return why the change is beyond a budget of bytes a device; None if it is not."""
        grown = self.peak_growth_bytes
        if grown > budget_bytes:
            return (
                f"{self.experiment}: the peak of a device grew by {grown} bytes, the budget "
                f"(compare_plans.budget_bytes) is {budget_bytes}"
            )
        fitted = self.before is None or self.before.plan.fit.fits
        if fitted and self.after is not None and not self.after.plan.fit.fits:
            return f"{self.experiment}: it does not fit"
        return None


def as_markdown(changes: Sequence[Change], before: str, after: str) -> str:
    """Return what changed, experiment by experiment.

    Args:
        changes: the experiments.
        before: name of the one side.
        after: name of the other.
    """
    lines = ["# Plans compared", "", f"Before: {before}. After: {after}.", ""]
    same = [change.experiment for change in changes if change.before == change.after]
    for change in changes:
        if change.experiment not in same:
            lines += [f"## `{change.experiment}`", "", *_one(change), ""]
    if same:
        lines += [f"Unchanged: {', '.join(f'`{name}`' for name in same)}.", ""]
    return "\n".join(lines)


def _one(change: Change) -> Iterator[str]:
    if change.after is None:
        yield "It is gone."
        return
    if change.before is None:
        yield f"It is new. {verdict(change.after.plan)}."
        return
    if keys := config_changes(change.before.config, change.after.config):
        yield from changes_table(keys, "before", "after")
    else:
        yield "No config key changed."
    yield ""
    yield from _phase_table(change.before.plan, change.after.plan)
    yield ""
    yield f"- Before: {verdict(change.before.plan)}."
    yield f"- After: {verdict(change.after.plan)}."


def _phase_table(before: RunPlanned, after: RunPlanned) -> list[str]:
    """Return the phases whose bytes changed, and how many did not."""
    old = {phase.name: phase.max_device_bytes for phase in before.phases}
    new = {phase.name: phase.max_device_bytes for phase in after.phases}
    rows = []
    for name in {**new, **old}:
        was, now = old.get(name), new.get(name)
        if was != now:
            rows.append([f"`{name}`", _bytes(was), _bytes(now), _difference(was, now)])
    same = len({**old, **new}) - len(rows)
    if not rows:
        return ["No phase changed its bytes."]
    heading = ["phase, bytes of the fullest device", "before", "after", "change"]
    table = markdown_table(heading, rows)
    return [*table, "", f"Phases that keep their bytes: {same}."] if same else table


def _bytes(size: int | None) -> str:
    return ABSENT if size is None else f"{size:,}"


def _difference(was: int | None, now: int | None) -> str:
    return ABSENT if was is None or now is None else f"{now - was:+,}"


def _peak_bytes(side: Planned) -> int:
    return peak_of(side.plan).max_device_bytes
