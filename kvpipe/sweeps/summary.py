"""What a sweep has found, read from the records of its jobs and from nothing else.

Its jobs may have run in other processes and on other machines, so what they returned does not count.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from kvpipe import errors
from kvpipe.errors import InputError
from kvpipe.ledger import KV, is_contracted
from kvpipe.records import (
    FAILED,
    INTERRUPTED,
    PASSED,
    RECORDS_FILE,
    SKIPPED,
    Check,
    PhaseRecord,
    SweepFinished,
    SweepJob,
    SweepLine,
)
from kvpipe.report.figures import total_of
from kvpipe.report.run import UNFINISHED, Run, read_run
from kvpipe.sweeps.jobs import Job, jobs_of
from kvpipe.sweeps.line import Line, fitted

TOKENS = "engine.max_total_tokens"
NOT_BEGUN = "not begun"
_HELD = (PASSED, SKIPPED)


def summary_of(sweep_dir: Path) -> SweepFinished:
    """Return what the records of a sweep's jobs tell.

    Args:
        sweep_dir: the sweep's directory.
    """
    jobs = jobs_of(sweep_dir)
    swept = _swept(jobs)
    rows = [_job(job, swept) for job in jobs]
    lines: list[SweepLine] = []
    if TOKENS in swept:
        lines, off = _held_against_lines(rows)
        rows = [replace(row, line_error_bytes=off.get(row.job)) for row in rows]
    checks = tuple(_on_line(row) for row in rows if row.line_error_bytes is not None)
    status, exit_code = _ending(rows, checks)
    return SweepFinished(
        experiment=", ".join(dict.fromkeys(row.experiment for row in rows if row.experiment)),
        status=status,
        exit_code=exit_code,
        sweep_dir=str(sweep_dir.absolute()),
        swept=swept,
        jobs=tuple(rows),
        lines=tuple(lines),
        checks=checks,
    )


def _swept(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Return the keys whose values differ from job to job."""
    keys = dict.fromkeys(key for job in jobs for key in job.values)
    return tuple(key for key in keys if len({job.values.get(key) for job in jobs}) > 1)


def _job(job: Job, swept: Sequence[str]) -> SweepJob:
    row = SweepJob(
        job=job.number,
        values={key: job.values[key] for key in swept if key in job.values},
        overrides=tuple(job.overrides),
        status=NOT_BEGUN,
        run_dir=str(job.directory.absolute()),
        command=job.command,
        error="it has not begun",
    )
    if not job.begun:
        return row
    row = replace(row, status=UNFINISHED)
    if not (job.directory / RECORDS_FILE).is_file():
        return replace(row, error="it has left no records")
    try:
        return replace(row, **_told(read_run(job.directory), job.directory))
    except InputError as error:
        return replace(row, error=str(error))


def _told(run: Run, directory: Path) -> dict[str, Any]:
    """Return what a run's records tell, by the names of the row's fields."""
    last = (
        f"after {run.phases[-1].phase!r}" if run.phases else "before its first phase had finished"
    )
    told: dict[str, Any] = {"status": run.status, "error": f"its records end {last}"}
    if run.finished:
        told |= {
            "exit_code": run.finished.exit_code,
            "error": run.finished.error,
            "elapsed_s": run.finished.elapsed_s,
            "taken_from": _taken_from(run.finished.run_dir, directory),
        }
    if run.started:
        told["experiment"] = run.started.experiment
    if run.planned:
        fit = run.planned.fit
        told |= {"fits": fit.fits, "largest_max_total_tokens": fit.max_total_tokens}
    return told | _measured(run)


def _taken_from(ran_in: str, directory: Path) -> str | None:
    """Return the directory that a run was in, if its records were copied from another sweep."""
    # Not the whole path: a sweep's directory may have been moved, or come from another machine.
    here = directory.absolute().parts[-2:]
    return None if Path(ran_in).parts[-2:] == here else ran_in


def _measured(run: Run) -> dict[str, Any]:
    planned = [phase.pools[KV] for phase in run.plan.values() if phase.pools.get(KV)]
    measured = [phase.ledger[KV] for phase in run.phases if phase.ledger.get(KV)]
    off_plan = [
        off
        for phase in run.phases
        for pool, off in phase.plan_error_bytes.items()
        if is_contracted(pool)
    ]
    on_devices = [phase for phase in run.phases if phase.ledger]
    same = [phase.fields["same_output"] for phase in run.phases if "same_output" in phase.fields]
    return {
        "max_total_tokens": _tokens(run),
        "kv_bytes": next(iter(measured), None),
        "planned_kv_bytes": next(iter(planned), None),
        "plan_error_bytes": max(off_plan, key=abs, default=None),
        "freed_bytes": next(_drops(run.phases), None),
        "peak_bytes": max(map(_peak, on_devices), default=None),
        "rebuild_s": next((p.duration_s for p in run.phases if "rebuild_info" in p.fields), None),
        "same_output": all(same) if same else None,
    }


def _drops(phases: Sequence[PhaseRecord]) -> Iterator[int]:
    """Yield the bytes that each drop of the KV cache gave back."""
    for phase in phases:
        if info := phase.fields.get("drop_info"):
            yield info["freed_bytes"]


def _peak(phase: PhaseRecord) -> int:
    """Return the most bytes that the devices held inside a phase or after it."""
    return max(total_of(phase), phase.peak.bytes_in_use_total if phase.peak else 0)


def _tokens(run: Run) -> int | None:
    """Return the capacity of the KV cache in whole pages, which is what the engine allocates."""
    engine = run.config.get("engine")
    if engine is None:
        return None
    page = engine["page_size"]
    return engine["max_total_tokens"] // page * page


def _held_against_lines(rows: Sequence[SweepJob]) -> tuple[list[SweepLine], dict[int, int | str]]:
    """Return the lines, and job → bytes that it is off its line.

    Jobs that differ in more than their tokens have lines of their own.
    """
    groups: dict[tuple[tuple[str, str], ...], list[SweepJob]] = defaultdict(list)
    for row in rows:
        if row.kv_bytes is not None and row.max_total_tokens is not None:
            others = tuple((key, value) for key, value in row.values.items() if key != TOKENS)
            groups[others].append(row)
    lines: list[SweepLine] = []
    off: dict[int, int | str] = {}
    for others, group in groups.items():
        if line := fitted(_points(group)):
            lines.append(
                SweepLine(
                    values=dict(others),
                    jobs=tuple(row.job for row in group),
                    bytes_per_token=_exact(line.slope),
                    bytes_at_no_tokens=_exact(line.intercept),
                )
            )
            off |= {row.job: _off(row, line) for row in group}
    return lines, off


def _points(rows: Sequence[SweepJob]) -> list[tuple[int, int]]:
    return [(row.max_total_tokens or 0, row.kv_bytes or 0) for row in rows]


def _off(row: SweepJob, line: Line) -> int | str:
    ((tokens, size),) = _points([row])
    return _exact(size - line.at(tokens))


def _exact(value: Fraction) -> int | str:
    """Return a fraction without rounding it."""
    return value.numerator if value.denominator == 1 else str(value)


def _on_line(row: SweepJob) -> Check:
    return Check(
        "kv_bytes_on_line",
        0,
        row.line_error_bytes,
        row.line_error_bytes == 0,
        f"bytes that job {row.job} is off the line",
    )


def _ending(rows: Sequence[SweepJob], checks: Sequence[Check]) -> tuple[str, int]:
    """Return the sweep's status and exit code."""
    signalled = [row.exit_code for row in rows if row.status == INTERRUPTED and row.exit_code]
    if signalled:
        return INTERRUPTED, signalled[0]
    held = all(row.status in _HELD for row in rows) and all(check.passed for check in checks)
    return (PASSED, errors.HELD) if held else (FAILED, errors.CHECK_FAILED)


def failed_jobs(sweep: SweepFinished) -> list[SweepJob]:
    """Return the jobs that neither held nor were skipped."""
    return [row for row in sweep.jobs if row.status not in _HELD]
