"""The page of a sweep: the verdict and what failed, the picture, then each job's numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvpipe.records import INTERRUPTED, PASSED, SKIPPED, SweepFinished, SweepJob
from kvpipe.report.markup import Markup, Node, element
from kvpipe.report.parts import (
    NONE,
    Cell,
    Section,
    breakable,
    figure,
    number,
    page,
    table,
)
from kvpipe.report.sweep_figures import figure_of, line_told, name_of
from kvpipe.report.sweep_words import counts_told, reason_of, result_of
from kvpipe.sinks.report import PAGE_FILE
from kvpipe.units import sized


def sweep_page(sweep: SweepFinished, folder: Path) -> str:
    """Return the page of a sweep as HTML.

    Args:
        sweep: what it has found.
        folder: where the page will stand; it links the pages of jobs from there.
    """
    sections = [*_figure_section(sweep), _jobs_section(sweep, folder), *_again_section(sweep)]
    title = f"Sweep of {sweep.experiment or 'kvpipe'}: {sweep.status}"
    return page(title, _header(sweep), sections, "Made by kvpipe from the records of the jobs.")


def _header(sweep: SweepFinished) -> Iterator[Node]:
    over = ", ".join(sweep.swept) or "one config"
    yield element("h1", f"{sweep.experiment or 'Sweep'} over ", breakable(over))
    yield element("p", element("code", breakable(sweep.sweep_dir)), class_="origin")
    yield _verdict(sweep)
    cards = [
        element("div", element("dt", name), element("dd", value, element("small", breakable(note))))
        for name, value, note in _cards(sweep)
    ]
    if cards:
        yield element("dl", cards, class_="cards")


def _verdict(sweep: SweepFinished) -> Markup:
    said = {PASSED: "Held", INTERRUPTED: "Interrupted"}.get(sweep.status, "Failed")
    tone = "good" if sweep.status == PASSED else "bad"
    told = [job for job in sweep.jobs if job.status != PASSED]
    off = [job for job in sweep.jobs if job.line_error_bytes]
    reasons = [
        element("li", element("strong", name_of(job)), f": {reason_of(job)}") for job in told
    ]
    reasons += [
        element("li", element("strong", name_of(job)), f": {job.line_error_bytes} B off the line")
        for job in off
    ]
    return element(
        "div",
        element("p", said, class_="said"),
        element("p", f"{counts_told(sweep)}."),
        element("ul", reasons) if reasons else [],
        class_=f"verdict {tone}",
    )


def _cards(sweep: SweepFinished) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and note of each key figure."""
    if len(sweep.lines) == 1:
        (line,) = sweep.lines
        slope = line.bytes_per_token
        told = f"{slope:,} bytes" if isinstance(slope, int) else f"{slope} bytes"
        yield "A token", told, f"of {len(line.jobs)} jobs, exactly"
    measured = [job for job in sweep.jobs if job.kv_bytes is not None]
    if measured:
        largest = max(measured, key=lambda job: job.kv_bytes or 0)
        size = largest.kv_bytes or 0
        yield "Largest KV cache", sized(size), f"{size:,} bytes, {name_of(largest)}"
    most = {job.largest_max_total_tokens for job in sweep.jobs} - {None}
    if len(most) == 1:
        (tokens,) = most
        yield "Would still fit", f"{tokens:,}", "engine.max_total_tokens, says the plan"
    if times := [(job.rebuild_s, name_of(job)) for job in sweep.jobs if job.rebuild_s is not None]:
        seconds, name = max(times)
        yield "Slowest rebuild", f"{seconds:.3f} s", name


def _figure_section(sweep: SweepFinished) -> Iterator[Section]:
    found = figure_of(sweep)
    if found is None:
        return
    chart, keys = found
    caption = (
        f"Bytes over all devices, exactly: {'; '.join(map(line_told, sweep.lines))}. The engine adds "
        "a page to the capacity that it is asked for."
        if sweep.lines
        else "Bytes over all devices, when the engine is ready."
    )
    yield Section("kv", "The KV cache", [figure(chart, "kv", keys, caption)])


def _jobs_section(sweep: SweepFinished, folder: Path) -> Section:
    numbers = ["KV bytes", "freed", "peak", "rebuild"]
    columns = [
        "job",
        *sweep.swept,
        "result",
        "KV bytes",
        "freed",
        "fits",
        "peak",
        "rebuild",
        "same output",
    ]
    rows = [_row(sweep, job, folder) for job in sweep.jobs]
    note = element(
        "p",
        "Bytes over all devices, measured; below them whether that is what was planned. The peak is "
        "the most that they were seen to hold, inside a phase or after it.",
    )
    whole = table("Jobs", columns, rows, numbers=numbers)
    return Section("jobs", "Jobs", [note, whole])


def _row(sweep: SweepFinished, job: SweepJob, folder: Path) -> list[str | Cell]:
    cells: list[str | Cell] = [_link(job, folder)]
    cells += [Cell(element("code", breakable(job.values.get(key, NONE)))) for key in sweep.swept]
    return [
        *cells,
        _result(job),
        _kv(job),
        number(job.freed_bytes, _freed(job)),
        _fits(job),
        number(job.peak_bytes),
        Cell(NONE if job.rebuild_s is None else f"{job.rebuild_s:.3f} s", class_="number"),
        _same(job),
    ]


def _link(job: SweepJob, folder: Path) -> Cell:
    """Return the job's number, as a link to its page if it has one."""
    its_page = Path(job.run_dir) / PAGE_FILE
    if not its_page.is_file():
        return Cell(str(job.job))
    href = its_page.relative_to(folder.absolute(), walk_up=True).as_posix()
    return Cell(element("a", str(job.job), href=href))


def _result(job: SweepJob) -> Cell:
    mark, tone = {PASSED: ("✓ ", "good-text"), SKIPPED: ("", "quiet")}.get(
        job.status, ("✗ ", "bad-text")
    )
    note = f"taken over from {job.taken_from}" if job.taken_from else ""
    return Cell(f"{mark}{result_of(job)}", note, tone)


def _kv(job: SweepJob) -> Cell:
    """Return the bytes of the KV cache, and whether they are where plan and line have them."""
    if job.kv_bytes is None:
        planned = job.planned_kv_bytes
        return number(None, "" if planned is None else f"{planned:,} planned")
    notes, wrong = [], bool(job.line_error_bytes)
    if job.planned_kv_bytes is not None:
        off = job.kv_bytes - job.planned_kv_bytes
        notes.append(f"{job.planned_kv_bytes:,} planned, {off:+,}" if off else "as planned")
        wrong |= off != 0
    if job.line_error_bytes is not None:
        off_line = job.line_error_bytes
        notes.append(f"{off_line} off the line" if off_line else "on the line")
    return Cell(f"{job.kv_bytes:,}", ", ".join(notes), "number bad-text" if wrong else "number")


def _freed(job: SweepJob) -> str:
    if job.freed_bytes is None or job.kv_bytes is None:
        return ""
    less = job.kv_bytes - job.freed_bytes
    return f"{less:,} less than it held" if less else "all of it"


def _fits(job: SweepJob) -> Cell:
    if job.fits is None:
        return Cell(NONE)
    return Cell("yes") if job.fits else Cell("no", f"{job.largest_max_total_tokens:,} tokens would")


def _same(job: SweepJob) -> Cell:
    if job.same_output is None:
        return Cell(NONE)
    return Cell("yes") if job.same_output else Cell("no", class_="bad-text")


def _again_section(sweep: SweepFinished) -> Iterator[Section]:
    """Yield the commands that do the jobs again that did not hold."""
    told = [job for job in sweep.jobs if job.status not in (PASSED, SKIPPED)]
    if told:
        content: Sequence[Node] = [
            element("p", "Each does one job again, alone:"),
            *(element("pre", job.command, class_="text") for job in told),
            element(
                "p",
                "The whole sweep again, with ",
                element("code", "sweep.resume=true"),
                ", runs only what has not passed.",
            ),
        ]
        yield Section("again", "Again", content)
