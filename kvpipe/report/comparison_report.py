"""A comparison as Markdown and as a page: one list of sections, two layouts.

``compare`` reports one comparison, ``compare-plans`` one for each experiment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from kvpipe.config.schema import CompareConfig
from kvpipe.pipeline.ledger import is_contracted
from kvpipe.report.chart import Chart
from kvpipe.report.chart import Row as ChartRow
from kvpipe.report.comparison import (
    FULLEST,
    PEAK,
    PROGRAMS,
    SECONDS,
    SHORTEST_S,
    TEXT,
    Comparison,
    PlanChange,
    Row,
)
from kvpipe.report.config_changes import KeyChange
from kvpipe.report.figures import pools_bar
from kvpipe.report.palette import pool_keys, pool_name, pool_roles
from kvpipe.report.plan import verdict as plan_verdict
from kvpipe.report.side import SidePhase
from kvpipe.report.tables import NONE, Cell, Table, at_least, number
from kvpipe.report.tokens import Omitted, Stretch, shortened
from kvpipe.units import counted

_MOST_NAMES = 3
_UNKNOWN_POOLS = "bytes in use, pools not known"


@dataclass(frozen=True)
class TokenDiff:
    """The token ids of a phase around where the sides ``before`` and ``after`` differ."""

    phase: str
    before: str
    after: str
    pieces: Sequence[Stretch | Omitted]


Content = Iterator[str | Table | TokenDiff]


def as_markdown(comparison: Comparison, config: CompareConfig) -> str:
    """Return a comparison, and its differences beyond the thresholds, as Markdown."""
    sides = [f"- {label}: `{side.name}` ({side.label})" for label, side in comparison.labelled]
    verdict = ["Nothing is beyond the thresholds."]
    if beyond := comparison.beyond(config):
        verdict = ["Beyond the thresholds:", "", *(f"- {why}" for why in beyond)]
    lines = ["# Runs compared", "", *sides, "", *verdict, ""]
    for title, content in _sections(comparison).values():
        lines += [f"## {title}", "", *_markdown(content)]
    return "\n".join(lines)


def plans_as_markdown(changes: Sequence[PlanChange], before: str, after: str) -> str:
    """Return the changes of plans as Markdown, experiment by experiment.

    ``before`` and ``after`` are the names of the sides, e.g. of a revision.
    """
    lines = ["# Plans compared", "", f"Before: {before}. After: {after}.", ""]
    for change in changes:
        if change.differs:
            lines += [f"## `{change.experiment}`", "", *_plan_change(change), ""]
    if same := [f"`{change.experiment}`" for change in changes if not change.differs]:
        lines += [f"Unchanged: {', '.join(same)}.", ""]
    return "\n".join(lines)


def comparison_page(comparison: Comparison, config: CompareConfig) -> str:
    """Return the page of a comparison as HTML."""
    from kvpipe.report.render import rendered

    sections, pools = _sections(comparison), _pools(comparison)
    return rendered(
        "comparison.html.j2",
        comparison=comparison,
        beyond=comparison.beyond(config),
        chart=_chart(comparison, pools),
        legend=pool_keys(pools),
        sections={"memory": "Memory side by side"} | {key: sections[key][0] for key in sections},
        content={key: content for key, (_, content) in sections.items()},
    )


def _sections(comparison: Comparison) -> dict[str, tuple[str, Content]]:
    """Return heading and content of each section, by its anchor."""
    return {
        "config": ("Config and versions", _config(comparison)),
        "bytes": ("Bytes", _sizes(comparison)),
        "outputs": ("Outputs", _outputs(comparison)),
        "times": ("Time and compilation", _times(comparison)),
    }


def _markdown(content: Content) -> Iterator[str]:
    """Yield the lines of sentences and tables, each with an empty line after it."""
    for part in content:
        if isinstance(part, str):
            yield from (part, "")
        elif isinstance(part, Table):
            yield from (*part.markdown(), "")


def _plan_change(change: PlanChange) -> Iterator[str]:
    old, new = change.plans
    if new is None:
        yield "It was removed."
    elif old is None:
        yield f"It is new. {plan_verdict(new)}."
    elif change.before and change.after:
        comparison = Comparison([change.before, change.after], ["before", "after"])
        yield from _markdown(chain(_config(comparison), _sizes(comparison)))
        yield f"- Before: {plan_verdict(old)}."
        yield f"- After: {plan_verdict(new)}."


def _config(comparison: Comparison) -> Content:
    (base, _), *others = comparison.labelled
    for label, side in others:
        changes = comparison.config_changes(side)
        if changes is None:
            yield f"The config of {base} or {label} is unknown."
        elif changes:
            yield _changes_table("config key", changes, base, label)
        else:
            yield f"No config key differs between {base} and {label}."
        if versions := comparison.version_changes(side):
            yield _changes_table("version of", versions, base, label)


def _changes_table(what: str, changes: Sequence[KeyChange], base: str, label: str) -> Table:
    rows = [
        [Cell(codes=[one.key]), Cell(codes=one.before), Cell(codes=one.after)] for one in changes
    ]
    return Table(f"{what}: {base} and {label}", [what, base, label], rows, texts=3)


def _sizes(comparison: Comparison) -> Content:
    plans = all(side.plan for side in comparison.sides)
    rows = [*comparison.sizes, *(comparison.rows(FULLEST) if plans else ())]
    differing = [row for row in rows if _is_change(row)]
    if differing:
        yield _sizes_table("Bytes that differ", comparison, differing)
    else:
        yield "No phase differs in its bytes."
    if same := [row for row in rows if not _is_change(row)]:
        summary = f"{counted(len(same), 'figure')} the same, or known of one side only"
        yield _sizes_table("Other bytes", comparison, same, summary)
    for label, side in comparison.labelled:
        if alone := comparison.only_in(side):
            yield f"Not on every side, but in {label}: {', '.join(f'`{name}`' for name in alone)}."


def _is_change(row: Row) -> bool:
    """Return whether two sides disagree, or a phase is in one plan alone."""
    return row.differs or (row.name == FULLEST and None in row.values)


def _sizes_table(
    name: str, comparison: Comparison, rows: Sequence[Row], summary: str = ""
) -> Table:
    base, *others = [label for label, _ in comparison.labelled]
    columns = ["bytes of", "phase", base, *others, *(f"{other} − {base}" for other in others)]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, *row.values), []).append(row)
    return Table(name, columns, [_size_row(group) for group in groups.values()], 2, summary)


def _size_row(group: Sequence[Row]) -> list[Cell]:
    """Return one row for a figure that has the same values in several phases."""
    row, more = group[0], len(group) - _MOST_NAMES
    codes = [one.phase for one in group[:_MOST_NAMES]]
    names = Cell(f"and {more} more" if more > 0 else "", codes=codes)
    grown = [_growth(row, index) for index in range(1, len(row.values))]
    cells = map(at_least if row.name == PEAK else number, row.values)
    return [Cell(pool_name(row.name)), names, *cells, *grown]


def _growth(row: Row, index: int) -> Cell:
    base = row.values[0]
    if base is None or row.values[index] is None:
        return Cell(NONE)
    more = row.growth(index)
    share = f"{100 * more / base:+.2f} %" if base and more else ""
    tone = "bad" if is_contracted(row.name) and more > 0 else ""
    return Cell(f"{more:+,}", note=share, tone=tone)


def _outputs(comparison: Comparison) -> Content:
    rows = [row for row in comparison.rows(TEXT) if None not in row.values]
    if not rows:
        yield "No output is known of every side."
        return
    base = comparison.labels[0]
    columns = ["phase", "side", f"compared with {base}", "SHA-256 of the text"]
    cells = [cells for row in rows for cells in _output_rows(comparison, row)]
    yield Table("Outputs", columns, cells, texts=4)
    for row in rows:
        before = comparison.sides[0].phases[row.phase].token_ids
        for label, side in comparison.labelled[1:]:
            after = side.phases[row.phase].token_ids
            if before is not None and after is not None and before != after:
                pieces = list(shortened(before, after))
                yield TokenDiff(row.phase, base, label, pieces)


def _output_rows(comparison: Comparison, row: Row) -> Iterator[list[Cell]]:
    for (label, side), sha256 in zip(comparison.labelled, row.values, strict=True):
        why = comparison.difference(row.phase, side)
        result = Cell(why, tone="bad") if why else Cell("the same", tone="good")
        result = Cell(NONE) if label == comparison.labels[0] else result
        yield [Cell(codes=[row.phase]), Cell(label), result, Cell(codes=[sha256])]


def _times(comparison: Comparison) -> Content:
    durations = comparison.rows(SECONDS)
    if not any(row.comparable for row in durations):
        yield "No durations are known of two sides."
        return
    compiled = {row.phase: row for row in comparison.rows(PROGRAMS)}
    base, *others = [label for label, _ in comparison.labelled]
    columns = [
        "phase",
        *(f"{label}, seconds" for label in (base, *others)),
        *(f"{label} / {base}" for label in others),
        *(f"{label}, programs" for label in (base, *others)),
    ]
    short: list[list[Cell]] = []
    rows: list[list[Cell]] = []
    for row in durations:
        programs = compiled[row.phase]
        brief = max(value or 0.0 for value in row.values) < SHORTEST_S and not programs.differs
        (short if brief else rows).append(_times_row(row, programs))
    if rows:
        yield Table("Durations and compilations", columns, rows)
    if short:
        count = f"{counted(len(short), 'phase')} of less than {SHORTEST_S} s"
        summary = f"{count} with the same number of programs"
        yield Table("Short phases", columns, short, summary=summary)


def _times_row(row: Row, programs: Row) -> list[Cell]:
    factors = [row.factor(index) for index in range(1, len(row.values))]
    texts = [
        *(NONE if value is None else f"{value:.3f}" for value in row.values),
        *(NONE if factor is None else f"{factor:.2f}" for factor in factors),
        *(str(value or NONE) for value in programs.values),
    ]
    return [Cell(codes=[row.phase]), *map(Cell, texts)]


def _chart(comparison: Comparison, pools: Sequence[str]) -> Chart:
    rows = []
    for name in comparison.phases:
        bars = [
            pools_bar(_held(phase), pool_roles(pools), label, phase.peak, lettered=True)
            for label, side in comparison.labelled
            if (phase := side.phase(name)).total
        ]
        if bars:
            rows.append(ChartRow(name, bars))
    labels = ", ".join(label for label, _ in comparison.labelled)
    return Chart(
        title="Device memory after each phase, side by side",
        description=f"For each of {counted(len(rows), 'phase')} a bar for each side, in the order {labels}. "
        "The table of bytes has every number.",
        rows=rows,
    )


def _pools(comparison: Comparison) -> list[str]:
    """Return every pool of every side, those that a plan holds to the byte first."""
    phases = [phase for side in comparison.sides for phase in side.phases.values()]
    found = dict.fromkeys(pool for phase in phases for pool in _held(phase))
    return sorted(found, key=lambda pool: not is_contracted(pool))


def _held(phase: SidePhase) -> Mapping[str, int]:
    """Return the bytes of a phase by pool; bytes of unknown pools are one more pool."""
    if phase.pools is None:
        return {_UNKNOWN_POOLS: phase.total} if phase.total else {}
    return phase.pools
