"""Summarise a sweep from the records of its jobs, and from nothing else.

Its jobs may have run in other processes and on other machines, so their return values do not count.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvpipe import errors
from kvpipe.errors import InputError
from kvpipe.pipeline.ledger import KV, is_contracted
from kvpipe.plan.pages import whole_pages
from kvpipe.records.run import FAILED, INTERRUPTED, PASSED, RECORDS_FILE, SKIPPED
from kvpipe.records.sweep import SweepFinished, SweepJob
from kvpipe.report.run import UNFINISHED, Run, read_run
from kvpipe.sweeps.jobs import Job, jobs_of

NOT_BEGUN = "not begun"
_HELD = (PASSED, SKIPPED)


def summary_of(sweep_dir: Path) -> SweepFinished:
    """Return the summary of the sweep in a directory."""
    jobs = jobs_of(sweep_dir)
    swept = _swept(jobs)
    rows = [_job(job, swept) for job in jobs]
    status, exit_code = _ending(rows)
    return SweepFinished(
        experiment=", ".join(dict.fromkeys(row.experiment for row in rows if row.experiment)),
        status=status,
        exit_code=exit_code,
        sweep_dir=str(sweep_dir.absolute()),
        swept=swept,
        jobs=tuple(rows),
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
        return replace(row, **_figures(read_run(job.directory), job.directory))
    except InputError as error:
        return replace(row, error=str(error))


def _figures(run: Run, directory: Path) -> dict[str, Any]:
    """Return the figures of a run, by the names of the row's fields."""
    last = (
        f"after {run.phases[-1].phase!r}" if run.phases else "before its first phase had finished"
    )
    found: dict[str, Any] = {"status": run.status, "error": f"its records end {last}"}
    if run.finished:
        found |= {
            "exit_code": run.finished.exit_code,
            "error": run.finished.error,
            "elapsed_s": run.finished.elapsed_s,
            "taken_from": _taken_from(run.finished.run_dir, directory),
        }
    if run.started:
        found["experiment"] = run.started.experiment
    if run.planned:
        fit = run.planned.fit
        found |= {"fits": fit.fits, "largest_max_total_tokens": fit.max_total_tokens}
    return found | _measured(run)


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
    used = [max(p.bytes_in_use, p.peak_bytes or 0) for p in run.phases if p.ledger]
    engine = run.config.get("engine")
    drops = [phase.fields.get("drop_info") for phase in run.phases]
    same = [phase.fields["same_output"] for phase in run.phases if "same_output" in phase.fields]
    return {
        # The engine allocates whole pages.
        "max_total_tokens": engine and whole_pages(engine["max_total_tokens"], engine["page_size"]),
        "kv_bytes": next(iter(measured), None),
        "planned_kv_bytes": next(iter(planned), None),
        "plan_error_bytes": max(off_plan, key=abs, default=None),
        "freed_bytes": next((info["freed_bytes"] for info in drops if info), None),
        "peak_bytes": max(used, default=None),
        "rebuild_s": next((p.duration_s for p in run.phases if "rebuild_info" in p.fields), None),
        "same_output": all(same) if same else None,
    }


def _ending(rows: Sequence[SweepJob]) -> tuple[str, int]:
    """Return the sweep's status and exit code."""
    signalled = [row.exit_code for row in rows if row.status == INTERRUPTED and row.exit_code]
    if signalled:
        return INTERRUPTED, signalled[0]
    held = all(row.status in _HELD for row in rows)
    return (PASSED, errors.HELD) if held else (FAILED, errors.CHECK_FAILED)
