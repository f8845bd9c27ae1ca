"""What differs between runs, and which of it is beyond what may differ."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from kvpipe.errors import InputError
from kvpipe.ledger import is_contracted
from kvpipe.report.config_changes import KeyChange, config_changes
from kvpipe.report.side import Side, SidePhase
from kvpipe.report.tokens import first_difference
from kvpipe.schema import CompareConfig

TOTAL, PEAK = "total", "peak inside"
# Shorter phases differ from run to run by more than they take.
SHORTEST_S = 0.1


@dataclass(frozen=True)
class Row:
    """A figure of a phase, on each side.

    Attributes:
        phase: name of the phase.
        name: what it is, e.g. a pool.
        values: its value on each side; None where it is not known.
    """

    phase: str
    name: str
    values: Sequence[Any]

    @property
    def comparable(self) -> bool:
        """Whether two sides know it."""
        return sum(value is not None for value in self.values) > 1

    @property
    def differs(self) -> bool:
        """Whether two sides know it and disagree."""
        return len({value for value in self.values if value is not None}) > 1


@dataclass(frozen=True)
class Group:
    """Phases that have the same values of a figure on every side.

    Attributes:
        phases: their names.
        name: what the figure is.
        values: its value on each side.
    """

    phases: Sequence[str]
    name: str
    values: Sequence[Any]

    def named(self) -> str:
        """Return the phases in a few words."""
        first, *others = self.phases
        return f"{first} and {len(others)} more" if others else first


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Return rows with the same figure and values as one, in the order of their first."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        found.setdefault((row.name, *row.values), []).append(row.phase)
    return [Group(phases, name, values) for (name, *values), phases in found.items()]


@dataclass(frozen=True)
class Comparison:
    """Sides, the first of which is what the others are held against.

    Attributes:
        sides: at least two.
    """

    sides: Sequence[Side]

    def __post_init__(self) -> None:
        base, *others = self.sides
        for other in others:
            if not base.phases.keys() & other.phases.keys():
                raise InputError(f"{base.name} and {other.name} have no phase in common")

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

    @cached_property
    def common(self) -> list[str]:
        """The phases that every side has."""
        return [name for name in self.phases if all(name in side.phases for side in self.sides)]

    def only_in(self, side: Side) -> list[str]:
        """Return the phases that a side has and another has not."""
        return [name for name in side.phases if name not in self.common]

    def config_changes(self, side: Side) -> list[KeyChange] | None:
        """Return what differs from the first side's config; None if one is not known."""
        base = self.sides[0].config
        if base is None or side.config is None:
            return None
        return config_changes(base, side.config)

    def version_changes(self, side: Side) -> list[KeyChange]:
        """Return the packages that both sides know, with another version."""
        base = self.sides[0].versions
        both = base.keys() & side.versions.keys()
        return config_changes(_of(base, both), _of(side.versions, both))

    @cached_property
    def sizes(self) -> list[Row]:
        """Bytes of each pool, their total and the peak, after each phase."""
        return [row for name in self.phases for row in self._sizes_of(name)]

    @cached_property
    def durations(self) -> list[Row]:
        """Seconds of each phase."""
        return self._rows("seconds", lambda phase: phase.duration_s)

    @cached_property
    def compilations(self) -> list[Row]:
        """Programs compiled in each phase."""
        return self._rows("programs", lambda phase: phase.compilations)

    @cached_property
    def outputs(self) -> list[Row]:
        """SHA-256 of the text of each output."""
        return self._rows("text", lambda phase: phase.text_sha256)

    def difference(self, phase: str, side: Side) -> str | None:
        """Return where a side's output differs from the first side's; None if it does not."""
        base, other = self.sides[0].phases.get(phase), side.phases.get(phase)
        if base is None or other is None or None in (base.text_sha256, other.text_sha256):
            return None
        if base.token_ids is not None and other.token_ids is not None:
            at = first_difference(base.token_ids, other.token_ids)
            return None if at is None else f"the first different token is at index {at}"
        return None if base.text_sha256 == other.text_sha256 else "the texts differ"

    def beyond(self, config: CompareConfig) -> list[str]:
        """Return what is beyond the thresholds, one message for each."""
        base = self.sides[0]
        found: list[str] = []
        for index, side in enumerate(self.sides[1:], start=1):
            found += [f"{side.name}: {why}" for why in self._beyond(base, side, index, config)]
        return found

    def to_json(self, config: CompareConfig) -> dict[str, Any]:
        """Return everything as a JSON object."""
        others = self.sides[1:]
        return {
            "sides": [
                {"name": side.name, "kind": side.kind, "status": side.status} for side in self.sides
            ],
            "only_in": {side.name: self.only_in(side) for side in self.sides},
            "config": {side.name: _changes(self.config_changes(side)) for side in others},
            "versions": {side.name: _changes(self.version_changes(side)) for side in others},
            "bytes": [asdict(row) for row in self.sizes],
            "durations_s": [asdict(row) for row in self.durations],
            "compilations": [asdict(row) for row in self.compilations],
            "outputs": [asdict(row) for row in self.outputs],
            "beyond": self.beyond(config),
        }

    def _sizes_of(self, name: str) -> Iterator[Row]:
        phases = [side.phases.get(name, SidePhase()) for side in self.sides]
        pools = dict.fromkeys(pool for phase in phases for pool in phase.pools or ())
        for pool in pools:
            yield Row(name, pool, [phase.held(pool) for phase in phases])
        if any(phase.total is not None for phase in phases):
            yield Row(name, TOTAL, [phase.total for phase in phases])
        if any(phase.peak is not None for phase in phases):
            yield Row(name, PEAK, [phase.peak for phase in phases])

    def _rows(self, what: str, value: Callable[[SidePhase], Any]) -> list[Row]:
        rows = [
            Row(name, what, [value(side.phases.get(name, SidePhase())) for side in self.sides])
            for name in self.phases
        ]
        return [row for row in rows if any(value is not None for value in row.values)]

    def _beyond(self, base: Side, side: Side, index: int, config: CompareConfig) -> Iterator[str]:
        if base.status == "passed" and side.status not in ("passed", None):
            yield f"its status is {side.status}, that of {base.name} is passed"
        yield from _grown_sizes(self.sizes, index, config)
        if config.outputs:
            for row in self.outputs:
                if why := self.difference(row.phase, side):
                    yield f"the output of {row.phase!r} is another: {why} (compare.outputs)"
        if config.compilations is not None:
            for row in self.compilations:
                more = _growth(row, index)
                if more > config.compilations:
                    yield (
                        f"{row.phase!r} compiled {more} more, compare.compilations is "
                        f"{config.compilations}"
                    )
        if config.duration_factor is not None:
            yield from _slower(self.durations, index, config.duration_factor)


def _grown_sizes(rows: Sequence[Row], index: int, config: CompareConfig) -> Iterator[str]:
    """Yield what grew too much, one message for each pool, with the phase of the most growth."""
    names = dict.fromkeys(row.name for row in rows)
    for name in sorted(names, key=lambda name: not is_contracted(name)):
        exact = is_contracted(name)
        key = "compare.budget_bytes" if exact else "compare.allowance_bytes"
        budget = config.budget_bytes if exact else config.allowance_bytes
        grown = {row.phase: _growth(row, index) for row in rows if row.name == name}
        beyond = {phase: more for phase, more in grown.items() if more > budget}
        if beyond:
            phase = max(beyond, key=beyond.__getitem__)
            where = f"after {phase!r}" + (
                f" and in {len(beyond) - 1} more" if beyond.keys() - {phase} else ""
            )
            yield f"{name} grew by {beyond[phase]:,} bytes {where}, {key} is {budget:,}"


def _slower(rows: Sequence[Row], index: int, most: float) -> Iterator[str]:
    for row in rows:
        factor = duration_factor(row, index)
        if factor is not None and factor > most:
            yield (
                f"{row.phase!r} took {factor:.2f} times as long, compare.duration_factor is {most}"
            )


def duration_factor(row: Row, index: int) -> float | None:
    """Return how many times as long a side took as the first; None if both took too little."""
    base, other = row.values[0], row.values[index]
    if base is None or other is None or max(base, other) < SHORTEST_S:
        return None
    return other / max(base, SHORTEST_S)


def _growth(row: Row, index: int) -> int:
    base, other = row.values[0], row.values[index]
    return 0 if base is None or other is None else other - base


def _of(versions: Mapping[str, str], names: set[str]) -> dict[str, str]:
    return {name: versions[name] for name in names}


def _changes(changes: Sequence[KeyChange] | None) -> list[dict[str, Any]] | None:
    return None if changes is None else [asdict(change) for change in changes]
