"""The table of a sweep for a terminal, and below it the failures with commands to repeat them."""

from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvpipe.records.run import PASSED, SKIPPED
from kvpipe.records.sweep import SWEEP_PAGE, SweepFinished
from kvpipe.report.sweep import bytes_a_token, counts, job_row, name_of, reason_of
from kvpipe.report.tables import NONE

_STYLES = {"good": "green", "quiet": "yellow", "bad": "red"}
_TEXTS = ("result", "fits", "same output")
# A narrow window leaves these out.
_OPTIONAL = ("peak",)


def print_sweep(sweep: SweepFinished, out: TextIO) -> None:
    """Print the table of a sweep and its verdict."""
    console = Console(file=out)
    whole = _table(sweep)
    # The width that it would take in a window of any width.
    wide = console.options.update_width(1000)
    if Measurement.get(console, wide, whole).maximum > console.width:
        whole = _table(sweep, left_out=_OPTIONAL)
    console.print()
    console.print(whole)
    for line in _below(sweep):
        # The terminal wraps, not rich: people copy paths and commands.
        console.print(line, soft_wrap=True)


def _table(sweep: SweepFinished, left_out: Sequence[str] = ()) -> Table:
    jobs = [(job, job_row(job)) for job in sweep.jobs]
    columns = [name for name in jobs[0][1] if name not in left_out]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("job", justify="right", no_wrap=True)
    for key in sweep.swept:
        # Broken at its own marks, so that a long key does not make the column wide.
        heading = key.rpartition(".")[2].replace("_", "_\n")
        table.add_column(heading, justify="right", overflow="fold")
    for name in columns:
        heading = name.replace("same ", "same\n")
        table.add_column(heading, justify="left" if name in _TEXTS else "right", overflow="fold")
    for job, row in jobs:
        cells = {name: Text(cell.text, _STYLES.get(cell.tone, "")) for name, cell in row.items()}
        if job.taken_from:
            cells["result"].append(" *")
        values = (Text(job.values.get(key, NONE)) for key in sweep.swept)
        table.add_row(Text(str(job.job)), *values, *(cells[name] for name in columns))
    return table


def _below(sweep: SweepFinished) -> Iterator[Text]:
    if any(job.taken_from for job in sweep.jobs):
        yield Text("* not run again: records of an earlier sweep", "dim")
    yield Text()
    if token := bytes_a_token(sweep):
        yield Text(f"the KV cache takes {token} bytes a token")
    for job in sweep.jobs:
        if job.status == SKIPPED:
            yield Text(f"skipped {name_of(job)}: {reason_of(job)}", "yellow")
        elif job.status != PASSED:
            yield Text(f"✗ {name_of(job)}: {reason_of(job)}", "red")
            yield Text.assemble(("  again: ", "dim"), job.command)
    style = "bold green" if sweep.exit_code == 0 else "bold red"
    ending = f" ({counts(sweep)}, exit code {sweep.exit_code})"
    yield Text.assemble((sweep.status, style), ending)
    yield Text.assemble(("sweep  ", "dim"), sweep.sweep_dir)
    yield Text.assemble(("page   ", "dim"), f"{sweep.sweep_dir}/{SWEEP_PAGE}")
