"""The report page of a run, from its records: the verdict first, then the picture, then numbers."""

from collections.abc import Iterator, Sequence

from kvpipe.ledger import KV, PARAMS, is_contracted
from kvpipe.records import PASSED, RECORDS_FILE, SKIPPED, Check, PhaseRecord
from kvpipe.report.chart import NARROW, WIDE
from kvpipe.report.config_changes import flat, value_text
from kvpipe.report.drawing import as_svg
from kvpipe.report.figures import (
    devices_drawing,
    host_chart,
    limit_bytes,
    memory_chart,
    memory_keys,
    total_of,
)
from kvpipe.report.legend import pool_name
from kvpipe.report.markup import Markup, Node, element
from kvpipe.report.parts import (
    NONE,
    Cell,
    Section,
    breakable,
    details,
    figure,
    named,
    number,
    page,
    table,
)
from kvpipe.report.run import UNFINISHED, Run
from kvpipe.report.texts import texts_section
from kvpipe.units import sized

_MOST_CHARS = 80
# More rows than this are folded away.
_MOST_ROWS = 100


def report_page(run: Run) -> str:
    """Return the page of a run as HTML."""
    sections = [
        _memory_section(run),
        _checks_section(run),
        _plan_section(run),
        _times_section(run),
        *texts_section(run),
        _config_section(run),
        _versions_section(run),
    ]
    title = f"{run.experiment}: {run.status}"
    return page(title, _header(run), sections, f"Made by kvpipe from {RECORDS_FILE}.")


def _header(run: Run) -> Iterator[Node]:
    yield element("h1", run.experiment)
    yield element("p", " · ".join(_origin(run)), class_="origin")
    where = run.finished.run_dir if run.finished else run.name
    yield element("p", element("code", where), class_="origin")
    yield _verdict(run)
    yield element("dl", [_card(*card) for card in _cards(run)], class_="cards")


def _origin(run: Run) -> Iterator[str]:
    if run.started:
        yield run.started.started_at.replace("T", " ").replace("+00:00", " UTC")
    if model := run.config.get("model"):
        yield str(model["id"])
    if run.planned:
        yield f"{run.planned.target} with {run.planned.devices} devices"


def _verdict(run: Run) -> Markup:
    tone = {PASSED: "good", SKIPPED: "", UNFINISHED: ""}.get(run.status, "bad")
    failed = [(phase, check) for phase, check in run.checks if not check.passed]
    error = run.finished.error if run.finished else None
    if error and any(check.name in error or check.detail == error for _, check in failed):
        error = None  # the list of failed checks says the same
    return element(
        "div",
        element("p", _said(run), class_="said"),
        element("p", _reason(run)),
        element("pre", error) if error else [],
        element("ul", [element("li", _failure(*one)) for one in failed]) if failed else [],
        class_=f"verdict {tone}".rstrip(),
    )


def _said(run: Run) -> str:
    if run.finished is None:
        return "It did not finish"
    if run.status == PASSED:
        return "Passed"
    if run.status == SKIPPED:
        return f"Skipped, exit code {run.finished.exit_code}"
    return f"Failed, exit code {run.finished.exit_code}"


def _reason(run: Run) -> str:
    passed = sum(check.passed for _, check in run.checks)
    steps = len(run.started.steps) if run.started else len(run.phases)
    ran = f"{len(run.phases)} of {steps} phases"
    if run.finished is None:
        last = f" after {run.phases[-1].phase!r}" if run.phases else ""
        return f"The records end{last}: {ran}, {passed} of {len(run.checks)} checks hold."
    return (
        f"{ran} in {run.finished.elapsed_s:.1f} s, {passed} of {len(run.checks)} checks hold. "
        f"{_bytes_said(run)}"
    )


def _bytes_said(run: Run) -> str:
    """Return whether the measured bytes are the planned ones."""
    compared = [phase for phase in run.phases if phase.plan_error_bytes]
    if not compared:
        return ""
    off = [
        phase.phase
        for phase in compared
        if any(n for pool, n in phase.plan_error_bytes.items() if is_contracted(pool))
    ]
    if off:
        return f"Measured bytes are not the planned ones after {', '.join(off)}."
    return (
        f"Parameters, KV cache and slots held the planned bytes, exactly, after each of "
        f"{len(compared)} phases."
    )


def _failure(phase: str, check: Check) -> Sequence[Node]:
    text = f" in {phase}: expected {_short(check.expected)}, it was {_short(check.actual)}"
    return [element("strong", check.name), text, f" ({check.detail})" if check.detail else ""]


def _cards(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and note of each key figure."""
    if not run.phases:
        return
    fullest = max(run.phases, key=total_of)
    limit = limit_bytes(run)
    of = f" of {sized(limit)}" if limit else ""
    yield "Most on the devices", sized(total_of(fullest)), f"after {fullest.phase}{of}"
    sampled = [(r.peak.bytes_in_use_total, r.phase) for r in run.phases if r.peak]
    if sampled:
        most, phase = max(sampled)
        yield "Peak inside a phase", sized(most), f"in {phase}"
    for pool in (PARAMS, KV):
        if most := max(phase.ledger.get(pool, 0) for phase in run.phases):
            name = pool_name(pool)
            yield name[0].upper() + name[1:], sized(most), f"{most:,} bytes"
    rss = max(run.phases, key=lambda phase: phase.memory.process_rss_bytes)
    yield "Host, resident", sized(rss.memory.process_rss_bytes), f"after {rss.phase}"
    compiled = sum(phase.compilations for phase in run.phases)
    seconds = sum(phase.compile_s for phase in run.phases)
    yield "Programs compiled", str(compiled), f"in {seconds:.1f} s, on all threads"


def _card(name: str, value: str, note: str) -> Markup:
    return element(
        "div", element("dt", name), element("dd", value, element("small", breakable(note)))
    )


def _memory_section(run: Run) -> Section:
    chart = memory_chart(run)
    content: list[Node] = []
    if any(bar.end for row in chart.rows for bar in row.bars):
        content.append(figure(chart, "memory", memory_keys(run), _memory_caption(run)))
    else:
        content.append(element("p", "No phase has held bytes on a device."))
    if each := _devices(run):
        content += [element("h3", "Each device"), *each]
    if run.phases:
        host = figure(host_chart(run), "host", [], _host_caption(run))
        content += [element("h3", "The host"), host]
    return Section("memory", "Memory after each phase", content)


def _memory_caption(run: Run) -> str:
    limit = limit_bytes(run)
    room = f" The devices have {sized(limit)} together." if limit else ""
    sources = {phase.memory.bytes_in_use_source for phase in run.phases}
    counted = (
        " Bytes in use are the sum of the live arrays, because this backend counts none."
        if "live_arrays" in sources
        else " What the devices count beyond the arrays is compiled programs and the runtime's own."
        if "device" in sources
        else ""
    )
    return f"Bytes over all devices, by pool.{counted}{room}"


def _host_caption(run: Run) -> str:
    most = max(phase.memory.process_peak_rss_bytes for phase in run.phases)
    return f"Resident set of the process that ran the phase. The largest that any had is {sized(most)}."


def _devices(run: Run) -> list[Markup]:
    svgs = []
    for form, width in (("wide", WIDE), ("narrow", NARROW)):
        if drawing := devices_drawing(run, width):
            svgs.append(as_svg(drawing, f"devices-{form}", form))
    if not svgs:
        return []
    caption = "Bytes in use after each phase, from left to right; all devices on one scale."
    return [element("figure", svgs, element("figcaption", caption))]


def _checks_section(run: Run) -> Section:
    if not run.checks:
        return Section("checks", "Checks", [element("p", "No phase has checked anything.")])
    # Bytes that are as planned stand in the table of planned and actual bytes, too.
    planned = [one for one in run.checks if one[1].passed and one[1].name.startswith("plan/")]
    others = [one for one in run.checks if one not in planned]
    passed = sum(check.passed for _, check in run.checks)
    content: list[Node] = [element("p", f"{passed} of {len(run.checks)} hold.")]
    content += _checks_table("Checks", others)
    if planned:
        said = f"{len(planned)} more: the bytes of a pool are the planned ones"
        content.append(details(said, *_checks_table("Checks of planned bytes", planned)))
    return Section("checks", "Checks", content)


def _checks_table(name: str, checks: Sequence[tuple[str, Check]]) -> list[Markup]:
    if not checks:
        return []
    columns = ["check", "phase", "result", "expected", "actual", "detail"]
    whole = table(name, columns, [_check_row(phase, check) for phase, check in checks])
    return [details(f"{len(checks)} checks", whole) if len(checks) > _MOST_ROWS else whole]


def _check_row(phase: str, check: Check) -> list[str | Cell]:
    result = (
        Cell("✓ holds", class_="good-text") if check.passed else Cell("✗ fails", class_="bad-text")
    )
    return [
        Cell(named(check.name)),
        Cell(named(phase)),
        result,
        Cell(_short(check.expected), class_="values"),
        Cell(_short(check.actual), class_="values"),
        Cell(check.detail, class_="values"),
    ]


def _short(value: object) -> str:
    """Return a value as text, cut off where it is long; the records have all of it."""
    if isinstance(value, list | tuple) and len(value) > 8:
        first = ", ".join(str(item) for item in value[:6])
        return f"[{first}, …] ({len(value)} values)"
    text = f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}… ({len(text)} characters)"


def _plan_section(run: Run) -> Section:
    columns = ["phase", *map(pool_name, run.pools), "total"]
    rows = [_plan_row(run, phase) for phase in run.phases]
    note = element(
        "p", "Bytes over all devices after each phase, measured; below them what was planned."
    )
    whole = table("Planned and actual bytes", columns, rows, numbers=columns[1:])
    folded = details("All phases", whole) if len(rows) > _MOST_ROWS else whole
    return Section("plan", "Planned and actual", [note, folded])


def _plan_row(run: Run, phase: PhaseRecord) -> list[str | Cell]:
    planned = run.plan.get(phase.phase)
    cells: list[str | Cell] = [Cell(named(phase.phase))]
    for pool in run.pools:
        held = phase.ledger.get(pool)
        expected = planned.pools.get(pool) if planned else None
        cells.append(number(held, _planned_note(held, expected)))
    total = sum(phase.ledger.values()) if phase.ledger else None
    expected = planned.total_bytes if planned and phase.ledger else None
    return [*cells, number(total, _planned_note(total, expected))]


def _planned_note(held: int | None, planned: int | None) -> str:
    if planned is None:
        return "" if held is None else "not planned"
    off = (held or 0) - planned
    return "as planned" if not off else f"{planned:,} planned, {off:+,}"


def _times_section(run: Run) -> Section:
    longest = max((phase.duration_s for phase in run.phases), default=0.0) or 1.0
    columns = ["phase", "seconds", "programs", "compiling", "since start", "host", "peak inside"]
    rows = [_times_row(phase, longest) for phase in run.phases]
    note = (
        "The seconds are the phase's own, with the devices synchronised. Compiling is the sum over "
        "all threads, so it can be more."
    )
    whole = table("Durations and compilations", columns, rows, numbers=columns[2:])
    folded = details("All phases", whole) if len(rows) > _MOST_ROWS else whole
    return Section("times", "Time and compilation", [element("p", note), folded])


def _times_row(phase: PhaseRecord, longest: float) -> list[str | Cell]:
    share = f"width:{100 * phase.duration_s / longest:.1f}%"
    bar = element("i", style=share, aria_hidden="true")
    return [
        Cell(named(phase.phase)),
        Cell([f"{phase.duration_s:.3f}", bar], class_="length"),
        Cell(str(phase.compilations or NONE), class_="number"),
        Cell(f"{phase.compile_s:.3f} s" if phase.compile_s else NONE, class_="number"),
        Cell(f"{phase.elapsed_s:.1f} s", class_="number"),
        number(phase.memory.process_rss_bytes),
        number(phase.peak.bytes_in_use_total if phase.peak else None),
    ]


def _config_section(run: Run) -> Section:
    rows = [
        [Cell(named(key)), Cell(element("code", value_text(value)), class_="values")]
        for key, value in flat(run.config)
    ]
    if not rows:
        return Section("config", "Config", [element("p", "The records have none.")])
    whole = table("Resolved config", ["key", "value"], rows)
    return Section("config", "Config", [details(f"{len(rows)} keys, resolved", whole)])


def _versions_section(run: Run) -> Section:
    versions = run.started.versions if run.started else {}
    rows: list[Sequence[str | Cell]] = [
        [name, Cell(element("code", v))] for name, v in versions.items()
    ]
    if not rows:
        return Section("versions", "Versions", [element("p", "The records have none.")])
    return Section("versions", "Versions", [table("Versions", ["package", "version"], rows)])
