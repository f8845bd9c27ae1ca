"""A comparison of runs as Markdown, for a terminal and a pull request."""

from collections.abc import Iterator, Sequence

from kvpipe.report.comparison import SHORTEST_S, Comparison, Group, Row, duration_factor, grouped
from kvpipe.report.config_changes import ABSENT, changes_table
from kvpipe.report.plan import markdown_table
from kvpipe.report.side import Side
from kvpipe.schema import CompareConfig


def letters(comparison: Comparison) -> list[str]:
    """Return a short name for each side: A, B and so on."""
    return [chr(ord("A") + index) for index in range(len(comparison.sides))]


def told(side: Side) -> str:
    """Return what a side is, in a few words."""
    return f"{side.kind}, {side.status}" if side.status else side.kind


def as_markdown(comparison: Comparison, config: CompareConfig) -> str:
    """Return what differs, and what of it is beyond the thresholds."""
    names = letters(comparison)
    lines = ["# Runs compared", ""]
    for letter, side in zip(names, comparison.sides, strict=True):
        lines.append(f"- {letter}: `{side.name}` ({told(side)})")
    lines += ["", *_verdict(comparison.beyond(config)), ""]
    lines += ["## Config", "", *_config(comparison, names), ""]
    lines += ["## Bytes", "", *_sizes(comparison, names), ""]
    lines += ["## Outputs", "", *_outputs(comparison, names), ""]
    lines += ["## Seconds", "", *_durations(comparison, names), ""]
    lines += ["## Programs compiled", "", *_compilations(comparison, names), ""]
    return "\n".join(lines)


def _verdict(beyond: Sequence[str]) -> list[str]:
    if not beyond:
        return ["Nothing is beyond the thresholds."]
    return ["Beyond the thresholds:", "", *(f"- {why}" for why in beyond)]


def _config(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    for index, (letter, side) in enumerate(zip(names[1:], comparison.sides[1:], strict=True)):
        if index:
            yield ""
        changes = comparison.config_changes(side)
        if changes is None:
            yield f"Of {names[0]} or {letter} no config is known."
        elif changes:
            yield from changes_table(changes, names[0], letter)
        else:
            yield f"{letter} has the config of {names[0]}."
        if versions := comparison.version_changes(side):
            yield ""
            yield from changes_table(versions, names[0], letter, "version of")


def _sizes(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    rows = [row for row in comparison.sizes if row.differs]
    if rows:
        heading = ["bytes of", "after", *names, *_growths(names)]
        yield from markdown_table(heading, [_size_row(one) for one in grouped(rows)], texts=2)
    else:
        yield "No phase differs in its bytes."
    same = sum(not row.differs for row in comparison.sizes)
    if rows and same:
        yield ""
        yield f"Figures that are the same, or known of one side only: {same}."
    for letter, side in zip(names, comparison.sides, strict=True):
        if alone := comparison.only_in(side):
            yield ""
            yield f"Not in every side, but in {letter}: {', '.join(f'`{n}`' for n in alone)}."


def _size_row(row: Group) -> list[str]:
    base = row.values[0]
    grown = [ABSENT if None in (base, value) else f"{value - base:+,}" for value in row.values[1:]]
    sizes = [ABSENT if value is None else f"{value:,}" for value in row.values]
    return [row.name, row.named(), *sizes, *grown]


def _growths(names: Sequence[str]) -> list[str]:
    return [f"{name} − {names[0]}" for name in names[1:]]


def _outputs(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    rows = [row for row in comparison.outputs if None not in row.values]
    if not rows:
        yield "No output is known of every side."
        return
    for row in rows:
        for letter, side in zip(names[1:], comparison.sides[1:], strict=True):
            why = comparison.difference(row.phase, side) or f"the same as in {names[0]}"
            yield f"- `{row.phase}`, {letter}: {why}; SHA-256 `{row.values[names.index(letter)]}`"


def _durations(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    rows = [row for row in comparison.durations if max(v or 0.0 for v in row.values) >= SHORTEST_S]
    if not any(row.comparable for row in rows):
        yield "No durations are known of two sides."
        return
    heading = ["phase", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    yield from markdown_table(heading, [_duration_row(row) for row in rows])
    yield ""
    yield f"Phases of less than {SHORTEST_S} s are left out."


def _duration_row(row: Row) -> list[str]:
    seconds = [ABSENT if value is None else f"{value:.2f}" for value in row.values]
    factors = [duration_factor(row, index) for index in range(1, len(row.values))]
    shown = [ABSENT if factor is None else f"{factor:.2f}" for factor in factors]
    return [f"`{row.phase}`", *seconds, *shown]


def _compilations(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    rows = [row for row in comparison.compilations if row.differs]
    if not any(row.comparable for row in comparison.compilations):
        yield "No counts are known of two sides."
        return
    if not rows:
        yield "No phase differs in how many programs it compiled."
        return
    cells = [
        [f"`{row.phase}`", *(ABSENT if v is None else str(v) for v in row.values)] for row in rows
    ]
    yield from markdown_table(["phase", *names], cells)
