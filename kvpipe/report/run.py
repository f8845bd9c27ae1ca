"""A run, built from its records: read from a file, or collected while it is under way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kvpipe.errors import InputError
from kvpipe.records.run import (
    RECORDS_FILE,
    Check,
    PhaseRecord,
    PlannedPhase,
    Record,
    RunFinished,
    RunPlanned,
    RunStarted,
    record_from_json,
)

PAGE_FILE = "report.html"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Run:
    """The records of a run by their kind; a run that was killed lacks the last ones."""

    name: str
    started: RunStarted | None
    planned: RunPlanned | None
    phases: Sequence[PhaseRecord]
    finished: RunFinished | None

    @property
    def experiment(self) -> str:
        """The name of the experiment; without a first record, that of the run."""
        return self.started.experiment if self.started else self.name

    @property
    def title(self) -> str:
        """The name of the experiment, and the run's label."""
        label = self.config.get("label")
        return f"{self.experiment}, {label}" if label else self.experiment

    @property
    def status(self) -> str:
        """The status in the last record; ``unfinished`` without one."""
        return self.finished.status if self.finished else UNFINISHED

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config."""
        return self.started.config if self.started else {}

    @property
    def checks(self) -> list[tuple[str, Check]]:
        """Every check with the name of its phase, in order."""
        return [(phase.phase, check) for phase in self.phases for check in phase.checks]

    @cached_property
    def plan(self) -> dict[str, PlannedPhase]:
        """The plan of each step, by its name."""
        return {phase.name: phase for phase in self.planned.phases} if self.planned else {}

    @property
    def pools(self) -> list[str]:
        """Every pool that is measured or planned, in the order in which they are first filled."""
        planned = self.planned.pools if self.planned else []
        measured = [pool for phase in self.phases for pool in phase.ledger]
        return list(dict.fromkeys([*planned, *measured]))


def run_of(name: str, records: Sequence[Record]) -> Run:
    """Return the run of these records.

    Each further first record is of a resumption. Of the records before it those of the steps that it
    skips remain; the others were of work that was lost.
    """
    starts = [i for i, record in enumerate(records) if isinstance(record, RunStarted)]
    run = _attempt(name, records[: starts[1] if len(starts) > 1 else None])
    for start, end in zip_longest(starts[1:], starts[2:]):
        run = _resumed(run, _attempt(name, records[start:end]))
    return run


def _attempt(name: str, records: Sequence[Record]) -> Run:
    return Run(
        name=name,
        started=next((r for r in records if isinstance(r, RunStarted)), None),
        planned=next((r for r in records if isinstance(r, RunPlanned)), None),
        phases=tuple(r for r in records if isinstance(r, PhaseRecord)),
        finished=next((r for r in records if isinstance(r, RunFinished)), None),
    )


def _resumed(before: Run, after: Run) -> Run:
    """Return the whole run of two parts, its steps in the order of the pipeline."""
    skipped = set(after.started.skipped) if after.started else set()
    kept = [phase for phase in before.phases if phase.phase in skipped]
    phases = sorted([*kept, *after.phases], key=lambda phase: phase.idx)
    planned = after.planned
    if planned and before.planned:
        earlier = [phase for phase in before.planned.phases if phase.name in skipped]
        planned = replace(planned, phases=(*earlier, *planned.phases))
    return replace(after, planned=planned, phases=tuple(phases))


def read_run(path: Path) -> Run:
    """Return the run of a run directory, or of a file with its lines.

    Raises:
        InputError: there is no such directory or file, or a line of it is no record.
    """
    file = records_file(path)
    if not (records := read_records(file)):
        raise InputError(f"{file}: it has no records")
    return run_of(path.name or str(path), records)


def read_records(file: Path) -> list[Record]:
    """Return the records of a file, in order.

    Raises:
        InputError: it cannot be read, or a line of it is no record.
    """
    records: list[Record] = []
    for where, line in _json_lines(file):
        try:
            records.append(record_from_json(line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"not a record of this version of kvpipe: {type(error).__name__}: {error}"
            raise InputError(f"{where}: {why}") from None
    return records


def records_file(path: Path) -> Path:
    """Return the file with the records of a run directory, or ``path`` if it is a file.

    Raises:
        InputError: there is no such directory or file, or it has no records.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"{path}: there is no such directory or file")
    if not (path / RECORDS_FILE).is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{RECORDS_FILE}"))
        hint = f"; of its directories these are runs: {', '.join(inside)}" if inside else ""
        raise InputError(f"{path}: there is no {RECORDS_FILE} in it, so it is not a run{hint}")
    return path / RECORDS_FILE


def read_text(file: Path) -> str:
    """Return the text of a file, without a byte order mark at its start.

    Raises:
        InputError: it cannot be read, or it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def _json_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return each line's place and object; a last line that was cut off by a kill is left out."""
    found = []
    # Not splitlines: it would split at U+2028 and the like, too.
    *lines, cut_off = read_text(file).split("\n")
    for number, text in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("phase"), str):
            raise InputError(f"{where}: not a record: it has no 'phase'")
        found.append((where, line))
    last = phase_line(cut_off)
    return found + ([(f"{file}, line {len(lines) + 1}", last)] if last else [])


def phase_line(text: str) -> dict[str, Any] | None:
    """Return the object of a JSON line with a phase; None if the line is something else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("phase"), str) else None
