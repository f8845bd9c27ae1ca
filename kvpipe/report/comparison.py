"""Diff runs and plans against the first of them, and hold the differences to thresholds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from kvpipe.config.schema import CompareConfig
from kvpipe.errors import InputError
from kvpipe.pipeline.ledger import is_contracted
from kvpipe.pipeline.output import difference
from kvpipe.records.run import OWN_CODE, RunPlanned
from kvpipe.report.config_changes import KeyChange, config_changes
from kvpipe.report.side import RUN, Side
from kvpipe.units import counted

TOTAL, PEAK, FULLEST = "total", "peak inside, sampled", "fullest device"
SECONDS, PROGRAMS, TEXT = "seconds", "programs", "text"
# Figure -> the attribute of a phase that has it.
FIGURES = {
    TOTAL: "total",
    PEAK: "peak",
    FULLEST: "fullest",
    SECONDS: "duration_s",
    PROGRAMS: "programs",
    TEXT: "text_sha256",
}
# A sample may miss the moment of the peak: those of one phase were up to 1.4 times each other.
PEAK_FACTOR = 1.5
# Shorter phases differ from run to run by more than they take.
SHORTEST_S = 0.1


@dataclass(frozen=True)
class Row:
    """A figure of a phase, e.g. a pool, with its value on each side; None is unknown."""

    phase: str
    name: str
    values: Sequence[Any]

    @property
    def comparable(self) -> bool:
        """Whether two sides know it."""
        return sum(value is not None for value in self.values) > 1

    @property
    def differs(self) -> bool:
        """Whether two sides know it and disagree; sampled peaks by more than they vary."""
        known = {value for value in self.values if value is not None}
        if self.name == PEAK and known:
            return max(known) > PEAK_FACTOR * min(known)
        return len(known) > 1

    def growth(self, index: int) -> int:
        """Return how much more it is on a side than on the first; 0 if unknown."""
        base, other = self.values[0], self.values[index]
        return 0 if None in (base, other) else other - base

    def factor(self, index: int) -> float | None:
        """Return how many times as many seconds a side took; None if both took too few."""
        base, other = self.values[0], self.values[index]
        if base is None or other is None or max(base, other) < SHORTEST_S:
            return None
        return other / max(base, SHORTEST_S)


@dataclass(frozen=True)
class Comparison:
    """At least two sides, each compared with the first; each has a short name, its label."""

    sides: Sequence[Side]
    labels: Sequence[str] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

    @classmethod
    def of(cls, sides: Sequence[Side]) -> "Comparison":
        """Return the comparison of these sides.

        Raises:
            InputError: one has no phase in common with the first.
        """
        base, *others = sides
        for other in others:
            if not base.phases.keys() & other.phases.keys():
                raise InputError(f"{base.name} and {other.name} have no phase in common")
        return cls(sides)

    @property
    def labelled(self) -> list[tuple[str, Side]]:
        """The sides with their labels."""
        return list(zip(self.labels, self.sides, strict=False))

    @cached_property
    def phases(self) -> list[str]:
        """Every phase of every side, in order."""
        names = list(self.sides[0].phases)
        for side in self.sides[1:]:
            before = ""
            for name in side.phases:
                if name not in names:
                    names.insert(names.index(before) + 1 if before else 0, name)
                before = name
        return names

    def only_in(self, side: Side) -> list[str]:
        """Return the phases of a side that another side lacks."""
        return [name for name in side.phases if not all(name in s.phases for s in self.sides)]

    def config_changes(self, side: Side) -> list[KeyChange] | None:
        """Return the differences from the first side's config; None if one is unknown."""
        base, other = self.sides[0].config, side.config
        return None if base is None or other is None else config_changes(base, other)

    def version_changes(self, side: Side) -> list[KeyChange]:
        """Return the packages that both sides know, with another version.

        Of runs also the user's own phases and sinks, which one of them may not have.
        """
        base, other = self.sides[0].versions, side.versions
        known = base.keys() & other.keys()
        if self.sides[0].kind == side.kind == RUN:
            known |= {name for name in (*base, *other) if name.startswith(OWN_CODE)}
        old, new = ({n: v for n, v in held.items() if n in known} for held in (base, other))
        return config_changes(old, new)

    @cached_property
    def sizes(self) -> list[Row]:
        """Bytes of each pool over all devices, their total and the peak, after each phase."""
        return [row for name in self.phases for row in self._sizes_of(name)]

    def rows(self, figure: str) -> list[Row]:
        """Return a figure of :data:`FIGURES` for each phase of which a side knows it."""
        rows = [
            Row(name, figure, [getattr(side.phase(name), FIGURES[figure]) for side in self.sides])
            for name in self.phases
        ]
        return [row for row in rows if any(value is not None for value in row.values)]

    def difference(self, name: str, side: Side) -> str | None:
        """Return how a side's output differs from the first side's; None if it does not."""
        base, other = self.sides[0].phase(name), side.phase(name)
        if None in (base.text_sha256, other.text_sha256):
            return None
        if base.token_ids is not None and other.token_ids is not None:
            return difference(base.token_ids, other.token_ids)
        return None if base.text_sha256 == other.text_sha256 else "the texts differ"

    def beyond(self, config: CompareConfig) -> list[str]:
        """Return one message for each difference beyond the thresholds."""
        return [
            f"{side.name}: {why}"
            for index, side in enumerate(self.sides[1:], start=1)
            for why in self._beyond(side, index, config)
        ]

    def to_json(self, config: CompareConfig) -> dict[str, Any]:
        """Return everything as a JSON object."""
        others = self.sides[1:]
        return {
            "sides": [
                {"name": side.name, "kind": side.kind, "status": side.status} for side in self.sides
            ],
            "only_in": {side.name: self.only_in(side) for side in self.sides},
            "config": {side.name: _as_dicts(self.config_changes(side)) for side in others},
            "versions": {side.name: _as_dicts(self.version_changes(side)) for side in others},
            "bytes": _as_dicts(self.sizes),
            "durations_s": _as_dicts(self.rows(SECONDS)),
            "compilations": _as_dicts(self.rows(PROGRAMS)),
            "outputs": _as_dicts(self.rows(TEXT)),
            "beyond": self.beyond(config),
        }

    def _sizes_of(self, name: str) -> Iterator[Row]:
        phases = [side.phase(name) for side in self.sides]
        pools = dict.fromkeys(pool for phase in phases for pool in phase.pools or ())
        for pool in pools:
            yield Row(name, pool, [phase.held(pool) for phase in phases])
        for figure in (TOTAL, PEAK):
            values = [getattr(phase, FIGURES[figure]) for phase in phases]
            if any(value is not None for value in values):
                yield Row(name, figure, values)

    def _beyond(self, side: Side, index: int, config: CompareConfig) -> Iterator[str]:
        base = self.sides[0]
        if base.status == "passed" and side.status not in ("passed", None):
            yield f"its status is {side.status}, that of {base.name} is passed"
        yield from _grown_sizes(self.sizes, index, config)
        if config.outputs:
            for row in self.rows(TEXT):
                if why := self.difference(row.phase, side):
                    yield f"the output of {row.phase!r} is another: {why} (compare.outputs)"
        if (most := config.compilations) is not None:
            for row in self.rows(PROGRAMS):
                if (more := row.growth(index)) > most:
                    yield f"{row.phase!r} compiled {more} more, compare.compilations is {most}"
        if (slowest := config.duration_factor) is not None:
            for row in self.rows(SECONDS):
                if (factor := row.factor(index) or 0.0) > slowest:
                    yield (
                        f"{row.phase!r} took {factor:.2f} times as long, compare.duration_factor "
                        f"is {slowest}"
                    )


@dataclass(frozen=True)
class PlanChange:
    """The plans of an experiment before and after a change; None where it does not exist."""

    experiment: str
    before: Side | None
    after: Side | None

    @property
    def plans(self) -> tuple[RunPlanned | None, RunPlanned | None]:
        """The two plans."""
        return self.before and self.before.plan, self.after and self.after.plan

    @property
    def differs(self) -> bool:
        """Whether the plans or the configs differ."""
        old, new = (side and (side.plan, side.config) for side in (self.before, self.after))
        return old != new

    def excess(self, budget_bytes: int) -> str | None:
        """Return why the change is beyond a budget of bytes on a device; None if it is not."""
        old, new = self.plans
        if old and new:
            grown = new.peak.most_device_bytes - old.peak.most_device_bytes
            if grown > budget_bytes:
                return (
                    f"{self.experiment}: the peak of a device grew by {counted(grown, 'byte')}, the budget "
                    f"(compare_plans.budget_bytes) is {budget_bytes}"
                )
        if new and not new.fit.fits and (old is None or old.fit.fits):
            return f"{self.experiment}: it does not fit"
        return None


def _grown_sizes(rows: Sequence[Row], index: int, config: CompareConfig) -> Iterator[str]:
    """Yield one message for each pool that grew too much, with the phase of the most growth."""
    names = dict.fromkeys(row.name for row in rows)
    for name in sorted(names, key=lambda name: not is_contracted(name)):
        exact = is_contracted(name)
        key = "compare.budget_bytes" if exact else "compare.allowance_bytes"
        budget = config.budget_bytes if exact else config.allowance_bytes
        grown = {row.phase: row.growth(index) for row in rows if row.name == name and row.differs}
        beyond = {phase: more for phase, more in grown.items() if more > budget}
        if beyond:
            phase = max(beyond, key=beyond.__getitem__)
            more = f" and in {len(beyond) - 1} more" if len(beyond) > 1 else ""
            grew = f"{name} grew by {counted(beyond[phase], 'byte')}"
            yield f"{grew} after {phase!r}{more}, {key} is {budget:,}"


def _as_dicts(values: Sequence[Any] | None) -> list[Mapping[str, Any]] | None:
    return None if values is None else [asdict(value) for value in values]
