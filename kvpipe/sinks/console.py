"""Show the run at a terminal: a line for the running phase, a row for each finished one.

Rows are printed as phases finish and stay above the live line, so a run that is killed, and a
window with fewer lines than the pipeline has steps, lose nothing. Sizes have the unit that suits
each; the exact bytes are in the records.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as LiveLine
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from kvpipe.pipeline.ledger import KV, OTHER, PARAMS, PROGRAM
from kvpipe.plan.kv_choice import described
from kvpipe.records.progress import Progress
from kvpipe.records.run import (
    ENGINE_LOG,
    PASSED,
    RECORDS_FILE,
    SKIPPED,
    Check,
    PhaseRecord,
    RunFinished,
    RunPlanned,
    RunStarted,
)
from kvpipe.report.palette import pool_kinds
from kvpipe.report.run import PAGE_FILE
from kvpipe.sinks import Sink
from kvpipe.units import brief, counted, sized

_NAME_WIDTH = 32
_CLOCK_WIDTH = len("⠋ ") + len(" 0:00:00 ")
_NONE = "–"
_MOST_CHARS = 300


@dataclass(frozen=True)
class _Column:
    """A column of numbers: its heading, its width, and whether a narrow window leaves it out."""

    heading: str
    width: int
    optional: bool = False


_COLUMNS = (
    _Column("seconds", 7),
    _Column("params", 6),
    _Column("kv", 5),
    _Column("slots", 5),
    _Column("other", 5, optional=True),
    _Column("total", 5),
    _Column("planned", 7),
    _Column("peak", 5, optional=True),
    _Column("RSS", 5, optional=True),
    _Column("compiled", 8, optional=True),
    _Column("checks", 6),
)


class ConsoleTable(Sink):
    """Shows the run at a terminal, by default on stdout."""

    # A terminal that is paused is meant to be.
    limited = False

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = LiveLine(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}", style="dim", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._name_width = _NAME_WIDTH
        self._phases = 0
        self._step = ""
        self._planned: Mapping[str, int] = {}

    def run_started(self, record: RunStarted) -> None:
        """Print the headings of the table and start the live line."""
        self._name_width = max([len("phase"), *(len(step) for step in record.steps)])
        label = record.config.get("label")
        name = f"kvpipe {record.experiment}{f', {label}' if label else ''}"
        title = Text.assemble((name, "bold"), (" (sizes in bytes; 1K is 1024)", "dim"))
        self._console.print(title)
        self._print_row("phase", [column.heading for column in _COLUMNS], "bold")
        self._live.start()

    def run_planned(self, record: RunPlanned) -> None:
        """Print the plan's verdict."""
        self._planned = {phase.name: phase.total_bytes for phase in record.phases}
        fit = record.fit
        peak = max(phase.most_device_bytes for phase in record.phases)
        verdict = "fits" if fit.fits else "does not fit"
        self._console.print(
            f"plan: {verdict} {record.target} × {record.devices}, peak {sized(peak)} of "
            f"{sized(fit.hbm_bytes)} a device in {fit.peak_phase}",
            style="dim" if fit.fits else "red",
            soft_wrap=True,
            highlight=False,
        )
        for line in described(record.kv_actions):
            self._console.print(line.replace("`", ""), style="dim", soft_wrap=True, highlight=False)
        if record.warning:
            line = f"warning: {record.warning}"
            self._console.print(line, style="yellow", soft_wrap=True, highlight=False)

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Show the step in the live line, with a clock of its own."""
        self._clear()
        self._step = step
        self._live.add_task(f"{idx + 1}/{total} {step}", total=total, completed=idx, doing="")

    def phase_progressed(self, progress: Progress) -> None:
        """Show in the live line how far the step is, if it is still the one that runs."""
        if progress.step != self._step:
            return
        for task in self._live.tasks:
            doing = Text(str(progress))
            doing.truncate(
                max(self._console.width - len(task.description) - _CLOCK_WIDTH, 0),
                overflow="ellipsis",
            )
            self._live.update(task.id, doing=doing.plain)

    def phase_finished(self, record: PhaseRecord) -> None:
        """Print the row of the phase."""
        self._clear()
        self._phases += 1
        cells = _cells(record, self._planned.get(record.phase))
        self._print_row(record.phase, cells, "" if record.passed else "red")
        if record.peak and record.peak.error:
            self._console.print(Text(f"  its peak is not known: {record.peak.error}", "red"))

    def run_finished(self, record: RunFinished) -> None:
        """Stop the live line and print the verdict, the failed checks and where everything is."""
        self._clear()
        self._live.stop()
        for line in _summary(record, self._phases):
            # The terminal wraps, not rich: people copy paths and commands.
            self._console.print(line, soft_wrap=True)

    def _clear(self) -> None:
        for task in self._live.task_ids:
            self._live.remove_task(task)

    def _print_row(self, name: str, cells: Sequence[str], style: str) -> None:
        columns = list(zip(_COLUMNS, cells, strict=True))
        if self._name_width + _width(_COLUMNS) > self._console.width:
            columns = [(column, cell) for column, cell in columns if not column.optional]
        left = self._console.width - _width([column for column, _ in columns])
        grid = Table.grid(
            Column(width=min(self._name_width, left), no_wrap=True, overflow="ellipsis"),
            *(Column(width=column.width, justify="right", no_wrap=True) for column, _ in columns),
            padding=(0, 1, 0, 0),
        )
        grid.add_row(Text(name), *(Text(cell) for _, cell in columns), style=style)
        self._console.print(grid)


def _width(columns: Sequence[_Column]) -> int:
    """Return the characters that columns take, each with the space before it."""
    return sum(1 + column.width for column in columns)


def _cells(record: PhaseRecord, planned: int | None) -> list[str]:
    """Return the cells of a row, one for each of :data:`_COLUMNS`, given the planned total."""
    held, checks = pool_kinds(record.ledger), record.checks
    other = [held[kind] for kind in (OTHER, PROGRAM) if kind in held]
    return [
        f"{record.duration_s:.2f}",
        *(_size(held.get(kind)) for kind in (PARAMS, KV, "slots")),
        _size(sum(other) if other else None),
        _size(held.total() if held else None),
        _size(planned),
        _size(record.peak_bytes),
        _size(record.memory.process_rss_bytes),
        str(record.compilations or _NONE),
        f"{sum(check.passed for check in checks)}/{len(checks)}" if checks else _NONE,
    ]


def _size(size: int | None) -> str:
    return _NONE if size is None else brief(size)


def _summary(record: RunFinished, phases: int) -> Iterator[Text]:
    """Yield the lines below the table."""
    passed = sum(check.passed for check in record.checks)
    checks = f"{passed}/{counted(len(record.checks), 'check')}"
    counts = f"{counted(phases, 'phase')}, {checks}, {record.elapsed_s:.1f} s"
    style = {PASSED: "bold green", SKIPPED: "bold yellow"}.get(record.status, "bold red")
    yield Text()
    yield Text.assemble((record.status, style), f" ({counts}, exit code {record.exit_code})")
    if record.error:
        yield Text(record.error, "yellow" if record.status == SKIPPED else "red")
    for check in record.checks:
        if not check.passed:
            yield Text(f"✗ {check.name}", "red")
            yield from _pairs(_check_rows(check), indent="  ")
    yield from _pairs(_places(record) | _wandb_rows(record.fields.get("wandb")))


def _places(record: RunFinished) -> dict[str, str]:
    """Return where a person looks next: the run, its page and, after a failure, the engine's log."""
    files = {"page": PAGE_FILE} | ({"log": ENGINE_LOG} if record.exit_code else {})
    paths = {name: Path(record.run_dir) / file for name, file in files.items()}
    written = {name: str(path) for name, path in paths.items() if path.is_file()}
    return {"run": record.run_dir} | written


def _check_rows(check: Check) -> dict[str, str]:
    rows = {"expected": _short(check.expected), "actual": _short(check.actual)}
    return rows | ({"detail": check.detail} if check.detail else {})


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= _MOST_CHARS:
        return text
    return f"{text[:_MOST_CHARS]}… ({len(text)} characters, whole in {RECORDS_FILE})"


def _wandb_rows(started: Mapping[str, Any] | None) -> dict[str, str]:
    """Return where W&B wrote, from the fields that its sink returned at the start."""
    if not started:
        return {}
    rows = {"W&B": f"{started['mode']} {started['url'] or started['dir'] or ''}".rstrip()}
    if started["mode"] == "offline":
        rows["upload"] = f"wandb sync {started['dir']}"
    if started["fallback"]:
        rows["offline"] = f"because {started['fallback_reason']}"
    return rows


def _pairs(rows: Mapping[str, str], indent: str = "") -> Iterator[Text]:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        yield Text.assemble((f"{indent}{name:<{width}}  ", "dim"), value)
