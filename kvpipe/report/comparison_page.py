"""A comparison of runs as a page: the verdict, the sides beside each other, what differs."""

from collections.abc import Iterator, Sequence

from kvpipe.ledger import is_contracted
from kvpipe.report.chart import Bar, Chart, Part, Row
from kvpipe.report.comparison import PEAK, TOTAL, Comparison, Group, duration_factor, grouped
from kvpipe.report.comparison import Row as Figures
from kvpipe.report.comparison_markdown import letters, told
from kvpipe.report.config_changes import KeyChange
from kvpipe.report.legend import Key, pool_keys, pool_name
from kvpipe.report.markup import Markup, Node, element
from kvpipe.report.palette import pool_roles
from kvpipe.report.parts import NONE, Cell, Section, details, figure, named, number, page, table
from kvpipe.report.side import Side, SidePhase
from kvpipe.report.texts import difference
from kvpipe.schema import CompareConfig
from kvpipe.units import sized


def comparison_page(comparison: Comparison, config: CompareConfig) -> str:
    """Return the page of a comparison as HTML."""
    sections = [
        _memory_section(comparison),
        _sizes_section(comparison),
        *_outputs_section(comparison),
        *_times_section(comparison),
        _config_section(comparison),
    ]
    header = _header(comparison, comparison.beyond(config))
    return page("Runs compared", header, sections, "Made by kvpipe from the records.")


def _header(comparison: Comparison, beyond: Sequence[str]) -> Iterator[Node]:
    yield element("h1", "Runs compared")
    for letter, side in zip(letters(comparison), comparison.sides, strict=True):
        what = [f"{letter}: ", element("code", side.name), f" · {told(side)}"]
        yield element("p", what, class_="origin")
    if beyond:
        reasons = element("ul", [element("li", why) for why in beyond])
        said = element("p", "Beyond the thresholds", class_="said")
        yield element("div", said, reasons, class_="verdict bad")
    else:
        said = element("p", "Within the thresholds", class_="said")
        note = "Nothing that counts has grown or changed by more than it may."
        yield element("div", said, element("p", note), class_="verdict good")
    yield element("dl", [_card(*card) for card in _cards(comparison)], class_="cards")


def _cards(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    for letter, side in zip(letters(comparison), comparison.sides, strict=True):
        totals = {name: phase.total for name, phase in side.phases.items() if phase.total}
        if totals:
            phase = max(totals, key=totals.__getitem__)
            yield f"{letter}: most on the devices", sized(totals[phase]), f"after {phase}"


def _card(name: str, value: str, note: str) -> Markup:
    return element("div", element("dt", name), element("dd", value, element("small", note)))


def _memory_section(comparison: Comparison) -> Section:
    names = letters(comparison)
    pools = _pools(comparison)
    roles = pool_roles(pools)
    rows = []
    for name in comparison.phases:
        phases = [side.phases.get(name, SidePhase()) for side in comparison.sides]
        bars = [
            Bar(_parts(phase, roles), letter, peak=phase.peak, lettered=True)
            for letter, phase in zip(names, phases, strict=True)
            if phase.total
        ]
        if bars:
            rows.append(Row(name, bars))
    chart = Chart(
        title="Device memory after each phase, side by side",
        description=f"For each of {len(rows)} phases a bar for each side, in the order "
        f"{', '.join(names)}. The table of bytes has every number.",
        rows=rows,
    )
    keys = pool_keys(roles)
    if any(p.total and p.pools is None for side in comparison.sides for p in side.phases.values()):
        keys.append(Key("pool-total", "bytes in use, pools not known"))
    caption = (
        f"Bytes over all devices after each phase; the bars of a phase are "
        f"{', '.join(names[:-1])} and {names[-1]}, from above."
    )
    return Section("memory", "Memory side by side", [figure(chart, "memory", keys, caption)])


def _pools(comparison: Comparison) -> list[str]:
    """Return every pool of every side, those that a plan holds to the byte first."""
    phases = [phase for side in comparison.sides for phase in side.phases.values()]
    found = dict.fromkeys(pool for phase in phases for pool in phase.pools or ())
    return sorted(found, key=lambda pool: not is_contracted(pool))


def _parts(phase: SidePhase, roles: dict[str, str]) -> list[Part]:
    if phase.pools is None:
        return [Part("bytes in use", "pool-total", phase.total or 0)]
    return [Part(pool, roles[pool], phase.pools[pool]) for pool in roles if phase.pools.get(pool)]


def _sizes_section(comparison: Comparison) -> Section:
    names = letters(comparison)
    differing = [row for row in comparison.sizes if row.differs]
    same = [row for row in comparison.sizes if not row.differs]
    columns = ["bytes of", "after", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    content: list[Node] = []
    if differing:
        rows = [_size_row(row) for row in grouped(differing)]
        content.append(table("Bytes that differ", columns, rows, numbers=columns[2:]))
    else:
        content.append(element("p", "No phase differs in its bytes."))
    if same:
        rows = [_size_row(row) for row in grouped(same)]
        whole = table("Other bytes", columns, rows, numbers=columns[2:])
        said = f"{len(same)} figures that are the same, or known of one side only"
        content.append(details(said, whole))
    for letter, side in zip(names, comparison.sides, strict=True):
        if alone := comparison.only_in(side):
            content.append(element("p", f"Not in every side, but in {letter}: {', '.join(alone)}."))
    return Section("bytes", "Bytes", content)


def _size_row(row: Group) -> list[str | Cell]:
    base = row.values[0]
    name = row.name if row.name in (TOTAL, PEAK) else pool_name(row.name)
    grown = [_growth(base, value, is_contracted(row.name)) for value in row.values[1:]]
    return [name, Cell(named(row.phases[0]), _others(row)), *map(number, row.values), *grown]


def _others(row: Group) -> str:
    return f"and {len(row.phases) - 1} more" if len(row.phases) > 1 else ""


def _growth(base: int | None, value: int | None, exact: bool) -> Cell:
    if base is None or value is None:
        return Cell(NONE, class_="number")
    more = value - base
    share = f"{100 * more / base:+.2f} %" if base and more else ""
    tone = " bad-text" if exact and more > 0 else ""
    return Cell(f"{more:+,}", share, f"number{tone}")


def _outputs_section(comparison: Comparison) -> Iterator[Section]:
    rows = [row for row in comparison.outputs if None not in row.values]
    if not rows:
        return
    names = letters(comparison)
    content: list[Node] = []
    cells: list[list[str | Cell]] = []
    for row in rows:
        for index, side in enumerate(comparison.sides):
            cells.append(_output_row(comparison, row, index, side))
    columns = ["phase", "side", "beside A", "SHA-256 of the text"]
    content.append(table("Outputs", columns, cells))
    for row in rows:
        content += _differences(comparison, row.phase, names)
    yield Section("outputs", "Outputs", content)


def _output_row(comparison: Comparison, row: Figures, index: int, side: Side) -> list[str | Cell]:
    why = comparison.difference(row.phase, side)
    same = Cell("–") if index == 0 else Cell("the same", class_="good-text")
    return [
        Cell(named(row.phase)),
        letters(comparison)[index],
        Cell(why, class_="bad-text") if why else same,
        Cell(element("code", row.values[index]), class_="values"),
    ]


def _differences(comparison: Comparison, phase: str, names: Sequence[str]) -> Iterator[Node]:
    base = comparison.sides[0].phases[phase].token_ids
    for letter, side in zip(names[1:], comparison.sides[1:], strict=True):
        other = side.phases[phase].token_ids
        if base is None or other is None or comparison.difference(phase, side) is None:
            continue
        yield element("h3", f"{phase}, {names[0]} and {letter}")
        yield difference(base, other, (names[0], letter))


def _times_section(comparison: Comparison) -> Iterator[Section]:
    known = [row for row in comparison.durations if row.comparable]
    if not known:
        return
    names = letters(comparison)
    compiled = {row.phase: row.values for row in comparison.compilations}
    columns = [
        "phase",
        *(f"{name}, seconds" for name in names),
        *(f"{name} / {names[0]}" for name in names[1:]),
        *(f"{name}, programs" for name in names),
    ]
    rows = [_times_row(row, compiled.get(row.phase, ())) for row in known]
    whole = table("Durations and compilations", columns, rows, numbers=columns[1:])
    yield Section("times", "Time and compilation", [whole])


def _times_row(row: Figures, compiled: Sequence[int | None]) -> list[str | Cell]:
    factors = [duration_factor(row, index) for index in range(1, len(row.values))]
    texts = [
        *(NONE if value is None else f"{value:.3f}" for value in row.values),
        *(NONE if factor is None else f"{factor:.2f}" for factor in factors),
        *(str(value or NONE) for value in compiled),
    ]
    return [Cell(named(row.phase)), *(Cell(text, class_="number") for text in texts)]


def _config_section(comparison: Comparison) -> Section:
    content: list[Node] = []
    names = letters(comparison)
    for letter, side in zip(names[1:], comparison.sides[1:], strict=True):
        changes = comparison.config_changes(side)
        if changes is None:
            content.append(element("p", f"Of {names[0]} or {letter} no config is known."))
        elif changes:
            content.append(_changes_table("config key", changes, names[0], letter))
        else:
            content.append(element("p", f"{letter} has the config of {names[0]}."))
        if versions := comparison.version_changes(side):
            content.append(_changes_table("version of", versions, names[0], letter))
    return Section("config", "Config and versions", content)


def _changes_table(what: str, changes: Sequence[KeyChange], base: str, other: str) -> Markup:
    rows = [
        [Cell(named(change.key)), _values(change.before), _values(change.after)]
        for change in changes
    ]
    return table(f"{what}: {base} and {other}", [what, base, other], rows)


def _values(texts: Sequence[str]) -> Cell:
    if not texts:
        return Cell(NONE)
    return Cell([[element("code", text), " "] for text in texts], class_="values")
