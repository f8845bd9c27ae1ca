"""The table of a sweep for a terminal, and below it what failed and how to do it again."""

from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvpipe.records import PASSED, SKIPPED, SweepFinished, SweepJob
from kvpipe.report.sweep_figures import line_told, name_of
from kvpipe.report.sweep_words import counts_told, reason_of, result_of
from kvpipe.units import sized

_NONE = "–"
_STYLES = {PASSED: "green", SKIPPED: "yellow"}


def print_sweep(sweep: SweepFinished, out: TextIO) -> None:
    """Print the table of a sweep and its verdict.

    Args:
        sweep: what it has found.
        out: where to.
    """
    console = Console(file=out)
    console.print()
    console.print(_table(sweep))
    for line in _below(sweep):
        # The terminal wraps, not rich: people copy paths and commands.
        console.print(line, soft_wrap=True)


def _table(sweep: SweepFinished) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("job", justify="right")
    for key in sweep.swept:
        table.add_column(key.rpartition(".")[2], justify="right", overflow="fold")
    table.add_column("result")
    for heading in ("KV bytes", "planned", "freed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits")
    for heading in ("peak", "rebuild"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same output")
    for job in sweep.jobs:
        table.add_row(*_cells(sweep, job))
    return table


def _cells(sweep: SweepFinished, job: SweepJob) -> Sequence[Text]:
    result = f"{result_of(job)} *" if job.taken_from else result_of(job)
    return [
        Text(str(job.job)),
        *(Text(job.values.get(key, _NONE)) for key in sweep.swept),
        Text(result, _STYLES.get(job.status, "red")),
        Text(_bytes(job.kv_bytes)),
        _planned(job),
        Text(_bytes(job.freed_bytes)),
        Text(_yes(job.fits)),
        Text(_NONE if job.peak_bytes is None else sized(job.peak_bytes)),
        Text(_NONE if job.rebuild_s is None else f"{job.rebuild_s:.3f} s"),
        Text(_yes(job.same_output), "red" if job.same_output is False else ""),
    ]


def _planned(job: SweepJob) -> Text:
    """Return how far the KV cache's bytes are from the plan; without a measurement, the plan."""
    if job.kv_bytes is None or job.planned_kv_bytes is None:
        return Text(_bytes(job.planned_kv_bytes))
    off = job.kv_bytes - job.planned_kv_bytes
    return Text(f"{off:+,}", "red") if off else Text("exact")


def _bytes(size: int | None) -> str:
    return _NONE if size is None else f"{size:,}"


def _yes(value: bool | None) -> str:
    return _NONE if value is None else "yes" if value else "no"


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
