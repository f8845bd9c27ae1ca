"""A sweep for people: a row for each job, the words of the verdict, the picture, the page."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from kvpipe.pipeline.ledger import KV
from kvpipe.records.run import INTERRUPTED, PASSED, SKIPPED
from kvpipe.records.sweep import SweepFinished, SweepJob
from kvpipe.report.chart import WIDE, Bar, Chart, Part, Row
from kvpipe.report.drawing import Drawing
from kvpipe.report.line_plot import LinePlot, Point
from kvpipe.report.palette import Key
from kvpipe.report.picture import framed
from kvpipe.report.run import PAGE_FILE
from kvpipe.report.tables import NONE, Cell, Table, number
from kvpipe.units import counted, sized

TOKENS = "engine.max_total_tokens"
_RESULTS = {PASSED: "held", SKIPPED: "skipped"}
_TONES = {PASSED: "good", SKIPPED: "quiet"}
_MARKS = {"good": "✓ ", "bad": "✗ "}
_ROLE = "pool-kv"
_MOST_CHARS = 300


def sweep_page(sweep: SweepFinished, folder: Path) -> str:
    """Return the page of a sweep as HTML; in ``folder``, its links to the pages of jobs hold."""
    from kvpipe.report.render import rendered

    found = figure_of(sweep)
    again = [job for job in sweep.jobs if job.status not in _RESULTS]
    return rendered(
        "sweep.html.j2",
        sweep=sweep,
        title=f"Sweep of {sweep.experiment or 'kvpipe'}: {sweep.status}",
        sections=({"kv": "The KV cache"} if found else {})
        | {"jobs": "Jobs"}
        | ({"again": "Again"} if again else {}),
        verdict={PASSED: "Held", INTERRUPTED: "Interrupted"}.get(sweep.status, "Failed"),
        counts=counts(sweep),
        reasons=[(name_of(job), reason_of(job)) for job in sweep.jobs if job.status != PASSED],
        name_of=name_of,
        tokens=TOKENS,
        figure=found,
        token=bytes_a_token(sweep),
        jobs=_jobs_table(sweep, folder),
        again=again,
    )


def picture(sweep: SweepFinished) -> Drawing | None:
    """Return the chart as a picture of its own; None if no job has measured a KV cache."""
    found = figure_of(sweep)
    return framed(found[0].drawn(WIDE), found[1]) if found else None


def figure_of(sweep: SweepFinished) -> tuple[Chart | LinePlot, list[Key]] | None:
    """Return the chart of a sweep and its legend; None if no job has measured a KV cache."""
    jobs = [job for job in sweep.jobs if job.kv_bytes is not None]
    if not jobs:
        return None
    if TOKENS in sweep.swept and len({job.max_total_tokens for job in jobs}) > 1:
        planned = Key(_ROLE, "planned", "pale")
        return _plot(sweep), [Key(_ROLE, "measured"), planned, Key("peak", "the plan", "line")]
    bars = Chart(
        title=f"Bytes of the KV cache of each job, {sweep.experiment}",
        description=f"A bar for each of {counted(len(jobs), 'job')}; the table of the jobs has every number.",
        rows=[Row(name_of(job), list(_bars(job))) for job in jobs],
    )
    return bars, [Key(_ROLE, "measured"), Key(_ROLE, "planned", "thin")]


def bytes_a_token(sweep: SweepFinished) -> str | None:
    """Return the bytes of a token in the plans of jobs that differ in their tokens alone."""
    jobs = [(job.max_total_tokens, job.planned_kv_bytes) for job in sweep.jobs]
    known = sorted((tokens, size) for tokens, size in jobs if tokens and size)
    if tuple(sweep.swept) != (TOKENS,) or not known or known[0][0] == known[-1][0]:
        return None
    (few, least), (many, most) = known[0], known[-1]
    slope = Fraction(most - least, many - few)
    return f"{slope.numerator:,}" if slope.is_integer() else str(slope)


def job_row(job: SweepJob) -> dict[str, Cell]:
    """Return the cells of a job by the heading of their column."""
    taken = f"taken over from {job.taken_from}" if job.taken_from else ""
    same = {None: Cell(NONE), True: Cell("yes"), False: Cell("no", tone="bad")}
    peak, seconds = job.peak_bytes, job.rebuild_s
    return {
        "result": Cell(result_of(job), note=taken, tone=_TONES.get(job.status, "bad")),
        "KV bytes": number(job.kv_bytes),
        "planned": _planned(job),
        "freed": number(job.freed_bytes, _freed_note(job)),
        "fits": _fits(job),
        "peak": Cell(NONE) if peak is None else Cell(sized(peak), note=counted(peak, "byte")),
        "rebuild": Cell(NONE if seconds is None else f"{seconds:.3f} s"),
        "same output": same[job.same_output],
    }


def name_of(job: SweepJob) -> str:
    """Return the name of a job: its values, or without any its number."""
    values = [f"{key.rpartition('.')[2]}={value}" for key, value in job.values.items()]
    return ", ".join(values) or f"job {job.job}"


def result_of(job: SweepJob) -> str:
    """Return how a job ended, in a word or two."""
    return _RESULTS.get(job.status, job.status)


def counts(sweep: SweepFinished) -> str:
    """Return the number of jobs by their result, without a full stop."""
    results = Counter(map(result_of, sweep.jobs))
    taken = sum(job.taken_from is not None for job in sweep.jobs)
    over = f"; {taken} taken over from earlier sweeps" if taken else ""
    each = ", ".join(f"{count} {result}" for result, count in results.items())
    return f"{counted(len(sweep.jobs), 'job')}: {each}{over}"


def reason_of(job: SweepJob) -> str:
    """Return in one line why a job did not hold."""
    line = " ".join((job.error or "its records do not say why").split())
    return line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]}…"


def _planned(job: SweepJob) -> Cell:
    """Return the distance of the KV cache's bytes from the plan; unmeasured, the plan."""
    if job.kv_bytes is None or job.planned_kv_bytes is None:
        return number(job.planned_kv_bytes)
    off = job.kv_bytes - job.planned_kv_bytes
    note = f"{job.planned_kv_bytes:,} planned"
    return Cell(f"{off:+,}", note=note, tone="bad") if off else Cell("exact")


def _freed_note(job: SweepJob) -> str:
    if job.freed_bytes is None or job.kv_bytes is None:
        return ""
    less = job.kv_bytes - job.freed_bytes
    return f"{less:,} less than it held" if less else "all of it"


def _fits(job: SweepJob) -> Cell:
    if job.fits is None:
        return Cell(NONE)
    if job.fits:
        return Cell("yes")
    return Cell("no", note=f"{job.largest_max_total_tokens:,} tokens would")


def _jobs_table(sweep: SweepFinished, folder: Path) -> Table:
    columns: list[str] = []
    rows: list[list[Cell]] = []
    for job in sweep.jobs:
        cells = job_row(job)
        result = cells["result"]
        cells["result"] = replace(result, text=_MARKS.get(result.tone, "") + result.text)
        values = [Cell(codes=[job.values.get(key, NONE)]) for key in sweep.swept]
        rows.append([Cell(str(job.job), href=_link(job, folder)), *values, *cells.values()])
        columns = ["job", *sweep.swept, *cells]
    return Table("Jobs", columns, rows, texts=2 + len(sweep.swept))


def _link(job: SweepJob, folder: Path) -> str:
    """Return the link to the job's page, empty if it has none."""
    page = Path(job.run_dir) / PAGE_FILE
    return Path(os.path.relpath(page, folder.absolute())).as_posix() if page.is_file() else ""


def _plot(sweep: SweepFinished) -> LinePlot:
    points = [
        Point(
            name_of(job),
            tuple(value for key, value in job.values.items() if key != TOKENS),
            job.max_total_tokens,
            job.kv_bytes,
            job.planned_kv_bytes,
        )
        for job in sweep.jobs
        if job.max_total_tokens is not None and job.kv_bytes is not None
    ]
    token = bytes_a_token(sweep)
    each = f" {token} bytes a token." if token else ""
    return LinePlot(
        title=f"Bytes of the KV cache over its tokens, {sweep.experiment}",
        description=f"{counted(len(points), 'job')}.{each} The table of the jobs has every number.",
        axis="capacity in tokens",
        points=points,
    )


def _bars(job: SweepJob) -> Iterator[Bar]:
    yield Bar([Part(KV, _ROLE, job.kv_bytes or 0)], "measured")
    if job.planned_kv_bytes is not None:
        yield Bar([Part(KV, _ROLE, job.planned_kv_bytes)], "planned", thin=True)
