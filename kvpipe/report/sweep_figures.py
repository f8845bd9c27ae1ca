"""The picture of a sweep: its KV caches over the tokens, or job by job if something else is swept."""

from collections.abc import Sequence
from fractions import Fraction

from kvpipe.ledger import KV
from kvpipe.records import SweepFinished, SweepJob, SweepLine
from kvpipe.report.chart import WIDE, Bar, Chart, Part, Row
from kvpipe.report.drawing import Drawing
from kvpipe.report.legend import Key
from kvpipe.report.line_plot import LinePlot, Point
from kvpipe.report.parts import Drawable
from kvpipe.report.picture import framed

_ROLE = "pool-kv"


def figure_of(sweep: SweepFinished) -> tuple[Drawable, list[Key]] | None:
    """Return the chart of a sweep and its legend; None if no job has measured a KV cache."""
    jobs = [job for job in sweep.jobs if job.kv_bytes is not None]
    if not jobs:
        return None
    if sweep.lines:
        return _plot(sweep, jobs), [
            Key(_ROLE, "measured"),
            Key(_ROLE, "planned", "pale"),
            Key("peak", "the line that they have to lie on", "line"),
        ]
    return _bars(sweep, jobs), [Key(_ROLE, "measured"), Key(_ROLE, "planned", "thin")]


def picture(sweep: SweepFinished) -> Drawing | None:
    """Return the chart as a picture that stands alone; None if there is none."""
    found = figure_of(sweep)
    if found is None:
        return None
    chart, keys = found
    return framed(chart.drawn(WIDE), keys)


def name_of(job: SweepJob) -> str:
    """Return what a job is called: its values, or without any its number."""
    values = [f"{key.rpartition('.')[2]}={value}" for key, value in job.values.items()]
    return ", ".join(values) or f"job {job.job}"


def line_told(line: SweepLine) -> str:
    """Return what a line says in a sentence without its full stop."""
    slope, rest = line.bytes_per_token, line.bytes_at_no_tokens
    token = f"{slope:,}" if isinstance(slope, int) else slope
    more = f"{rest:,}" if isinstance(rest, int) else rest
    which = ", ".join(f"{key}={value}" for key, value in line.values.items())
    return f"{token} bytes a token, and {more} bytes at none{f' ({which})' if which else ''}"


def _plot(sweep: SweepFinished, jobs: Sequence[SweepJob]) -> LinePlot:
    points = [
        Point(
            name_of(job),
            job.max_total_tokens or 0,
            job.kv_bytes or 0,
            job.planned_kv_bytes,
            job.line_error_bytes or None,
        )
        for job in jobs
        if job.line_error_bytes is not None
    ]
    lines = [
        (Fraction(line.bytes_per_token), Fraction(line.bytes_at_no_tokens)) for line in sweep.lines
    ]
    told = "; ".join(map(line_told, sweep.lines))
    return LinePlot(
        title=f"Bytes of the KV cache over its tokens, {sweep.experiment}",
        description=f"{len(points)} jobs. {told}. The table of the jobs has every number.",
        axis="capacity in tokens",
        points=points,
        lines=lines,
    )


def _bars(sweep: SweepFinished, jobs: Sequence[SweepJob]) -> Chart:
    return Chart(
        title=f"Bytes of the KV cache of each job, {sweep.experiment}",
        description=f"A bar for each of {len(jobs)} jobs; the table of the jobs has every number.",
        rows=[_row(job) for job in jobs],
    )


def _row(job: SweepJob) -> Row:
    bars = [Bar([Part(KV, _ROLE, job.kv_bytes or 0)], "measured")]
    if job.planned_kv_bytes is not None:
        bars.append(Bar([Part(KV, _ROLE, job.planned_kv_bytes)], "planned", thin=True))
    return Row(name_of(job), bars)
