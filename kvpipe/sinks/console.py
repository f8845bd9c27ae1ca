"""What people at a terminal see: a line for the phase that runs, a row for each that has finished.

Rows are printed as phases finish and stay above the live line, so a run that is killed, and a
window with fewer lines than the pipeline has steps, lose nothing. Sizes are GiB here and only here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from kvpipe.ledger import KV, OTHER, PARAMS, PROGRAM, slot_pool
from kvpipe.records import Check, PhaseRecord, RunFinished

_GIB = 1024**3
_NAME_WIDTH = 32
_NONE = "–"


@dataclass(frozen=True)
class _Column:
    """A column of numbers: its heading, its width, and whether a narrow window leaves it out."""

    heading: str
    width: int
    optional: bool = False


_COLUMNS = (
    _Column("seconds", 7),
    _Column("params", 6),
    _Column("kv", 6),
    _Column("slots", 6),
    _Column("other", 6),
    _Column("total", 6),
    _Column("RSS", 6, optional=True),
    _Column("compiled", 8, optional=True),
    _Column("checks", 6),
)


class ConsoleTable:
    """Shows the run at a terminal.

    Args:
        console: where to; None is stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._name_width = _NAME_WIDTH
        self._phases = 0

    def run_started(self, config: dict[str, Any]) -> None:
        """Print the headings of the table and start the live line."""
        self._name_width = max([len("phase"), *(len(str(step)) for step in config["pipeline"])])
        self._console.print(
            Text(f"kvpipe {config['experiment']}", style="bold"), Text("sizes in GiB")
        )
        self._print_row("phase", [column.heading for column in _COLUMNS], "bold")
        self._progress.start()

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Show the step in the live line, with a clock of its own."""
        self._clear()
        self._progress.add_task(f"{idx + 1}/{total} {step}", total=total, completed=idx)

    def phase_finished(self, record: PhaseRecord) -> None:
        """Print the row of the phase."""
        self._clear()
        self._phases += 1
        self._print_row(record.phase, _cells(record), "" if record.passed else "red")

    def run_finished(self, record: RunFinished) -> None:
        """Stop the live line and print the verdict, the failed checks and where everything is."""
        self._clear()
        self._progress.stop()
        self._console.print(_summary(record, self._phases))

    def _clear(self) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)

    def _print_row(self, name: str, cells: Sequence[str], style: str) -> None:
        columns = list(zip(_COLUMNS, cells, strict=True))
        if self._width(_COLUMNS) > self._console.width:
            columns = [(column, cell) for column, cell in columns if not column.optional]
        name_width = self._console.width - self._width([column for column, _ in columns], 0)
        grid = Table.grid(
            Column(width=min(self._name_width, name_width), no_wrap=True, overflow="ellipsis"),
            *(Column(width=column.width, justify="right", no_wrap=True) for column, _ in columns),
            padding=(0, 1, 0, 0),
        )
        grid.add_row(Text(name), *(Text(cell) for _, cell in columns), style=style)
        self._console.print(grid)

    def _width(self, columns: Sequence[_Column], name_width: int | None = None) -> int:
        name_width = self._name_width if name_width is None else name_width
        return name_width + sum(1 + column.width for column in columns)


def _cells(record: PhaseRecord) -> list[str]:
    """Return the cells of a row, one for each of :data:`_COLUMNS`."""
    ledger = record.ledger
    slots = [size for pool, size in ledger.items() if pool.startswith(slot_pool(""))]
    rest = [ledger[pool] for pool in (OTHER, PROGRAM) if pool in ledger]
    passed = sum(check.passed for check in record.checks)
    return [
        f"{record.duration_s:.2f}",
        _gib(ledger.get(PARAMS)),
        _gib(ledger.get(KV)),
        _gib(sum(slots) if slots else None),
        _gib(sum(rest) if rest else None),
        _gib(sum(ledger.values()) if ledger else None),
        _gib(record.memory.process_rss_bytes),
        str(record.compilations or _NONE),
        f"{passed}/{len(record.checks)}" if record.checks else _NONE,
    ]


def _gib(size: int | None) -> str:
    """Return bytes as GiB in six characters or fewer, for anything below 10 TiB."""
    if size is None:
        return _NONE
    gib = size / _GIB
    digits = 3 if gib < 10 else 2 if gib < 100 else 1
    return f"{gib:.{digits}f}"


def _summary(record: RunFinished, phases: int) -> RenderableType:
    passed = sum(check.passed for check in record.checks)
    counts = f"{phases} phases, {passed}/{len(record.checks)} checks, {record.elapsed_s:.1f} s"
    style = "bold green" if record.exit_code == 0 else "bold red"
    lines: list[RenderableType] = [
        "",
        Text.assemble((f"{record.status} ", style), f"({counts}, exit code {record.exit_code})"),
    ]
    if record.error:
        lines.append(Text(record.error, style="red"))
    lines += [_check(check) for check in record.checks if not check.passed]
    return Group(*lines, _places(record))


def _check(check: Check) -> RenderableType:
    rows = [("expected", repr(check.expected)), ("actual", repr(check.actual))]
    if check.detail:
        rows.append(("detail", check.detail))
    return Group(Text(f"✗ {check.name}", style="red"), _pairs(rows, indent=2))


def _places(record: RunFinished) -> RenderableType:
    return _pairs([("run", record.run_dir), *_wandb_rows(record.fields.get("wandb"))])


def _wandb_rows(started: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return where W&B wrote, from the fields that its sink returned at the start."""
    if not started:
        return []
    where = started["url"] or started["dir"] or ""
    rows = [("W&B", f"{started['mode']} {where}".rstrip())]
    if started["mode"] == "offline":
        rows.append(("upload", f"wandb sync {started['dir']}"))
    if started["fallback"]:
        rows.append(("offline, because", started["fallback_reason"]))
    return rows


def _pairs(rows: Sequence[tuple[str, str]], indent: int = 0) -> Table:
    # Paths and commands are folded, not cut: people copy them.
    grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for name, value in rows:
        grid.add_row(Text(" " * indent + name, style="dim"), Text(value))
    return grid
