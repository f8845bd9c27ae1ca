"""The table of a sweep for a terminal, and below it what failed and how to do it again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvpipe.records import PASSED, SKIPPED, SweepFinished, SweepJob
from kvpipe.report.sweep_figures import line_told, name_of
from kvpipe.report.sweep_words import counts_told, reason_of, result_of
from kvpipe.units import sized

_NONE = "–"


@dataclass(frozen=True)
class _Column:
    """A column: its heading, its cell for a job, and whether a narrow window leaves it out."""

    heading: str
    cell: Callable[[SweepJob], Text]
    number: bool = True
    optional: bool = False


_STYLES = {PASSED: "green", SKIPPED: "yellow"}


def print_sweep(sweep: SweepFinished, out: TextIO) -> None:
    """Print the table of a sweep and its verdict.

    Args:
        sweep: what it has found.
        out: where to.
    """
    console = Console(file=out)
    whole = _table(sweep, _COLUMNS)
    # What it would like to have, were the window as wide as that.
    wide = console.options.update_width(1000)
    if Measurement.get(console, wide, whole).maximum > console.width:
        whole = _table(sweep, [column for column in _COLUMNS if not column.optional])
    console.print()
    console.print(whole)
    for line in _below(sweep):
        # The terminal wraps, not rich: people copy paths and commands.
        console.print(line, soft_wrap=True)


def _table(sweep: SweepFinished, columns: Sequence[_Column]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("job", justify="right", no_wrap=True)
    for key in sweep.swept:
        # Broken at its own marks, so that a long key does not make the column wide.
        heading = key.rpartition(".")[2].replace("_", "_\n")
        table.add_column(heading, justify="right", overflow="fold")
    for column in columns:
        justify = "right" if column.number else "left"
        table.add_column(column.heading, justify=justify, overflow="fold")
    for job in sweep.jobs:
        values = (Text(job.values.get(key, _NONE)) for key in sweep.swept)
        table.add_row(Text(str(job.job)), *values, *(column.cell(job) for column in columns))
    return table


def _result(job: SweepJob) -> Text:
    taken = " *" if job.taken_from else ""
    return Text(f"{result_of(job)}{taken}", _STYLES.get(job.status, "red"))


def _planned(job: SweepJob) -> Text:
    """Return how far the KV cache's bytes are from the plan; without a measurement, the plan."""
    if job.kv_bytes is None or job.planned_kv_bytes is None:
        return Text(_bytes(job.planned_kv_bytes))
    off = job.kv_bytes - job.planned_kv_bytes
    return Text(f"{off:+,}", "red") if off else Text("exact")


def _bytes(size: int | None) -> str:
    return _NONE if size is None else f"{size:,}"


def _peak(job: SweepJob) -> Text:
    return Text(_NONE if job.peak_bytes is None else sized(job.peak_bytes))


def _rebuild(job: SweepJob) -> Text:
    return Text(_NONE if job.rebuild_s is None else f"{job.rebuild_s:.3f} s")


def _yes(value: bool | None, bad: str = "") -> Text:
    if value is None:
        return Text(_NONE)
    return Text("yes") if value else Text("no", bad)


_COLUMNS = (
    _Column("result", _result, number=False),
    _Column("KV bytes", lambda job: Text(_bytes(job.kv_bytes))),
    _Column("planned", _planned),
    _Column("freed", lambda job: Text(_bytes(job.freed_bytes))),
    _Column("fits", lambda job: _yes(job.fits), number=False),
    _Column("peak", _peak, optional=True),
    _Column("rebuild", _rebuild),
    _Column("same\noutput", lambda job: _yes(job.same_output, "red"), number=False),
)


def _below(sweep: SweepFinished) -> Iterator[Text]:
    if any(job.taken_from for job in sweep.jobs):
        yield Text("* not run again: records of an earlier sweep", "dim")
    yield Text()
    for line in sweep.lines:
        yield Text(f"the KV cache takes {line_told(line)}")
    for job in sweep.jobs:
        if job.line_error_bytes:
            yield Text(f"✗ {name_of(job)}: {job.line_error_bytes} bytes off that line", "red")
    for job in sweep.jobs:
        if job.status == SKIPPED:
            yield Text(f"skipped {name_of(job)}: {reason_of(job)}", "yellow")
        elif job.status != PASSED:
            yield Text(f"✗ {name_of(job)}: {reason_of(job)}", "red")
            yield Text.assemble(("  again: ", "dim"), job.command)
    style = "bold green" if sweep.exit_code == 0 else "bold red"
    counts = f" ({counts_told(sweep)}, exit code {sweep.exit_code})"
    yield Text.assemble((sweep.status, style), counts)
    yield Text.assemble(("sweep  ", "dim"), sweep.sweep_dir)
