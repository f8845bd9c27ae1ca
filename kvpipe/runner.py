"""The loop in the worker: run each step, measure after it, compare with the plan, emit a record.

A record is emitted for the step that fails too: out of memory is exactly when memory matters.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe import probe
from kvpipe.context import WorkerContext
from kvpipe.engine.compile_count import CompileCounter
from kvpipe.errors import KvpipeError
from kvpipe.ledger import Ledger, differences
from kvpipe.phase import Result, WorkerPhase
from kvpipe.records import Check, PhaseRecord, RunPlanned


class CheckFailed(KvpipeError):
    """A check of a phase did not hold; the record says which."""


@dataclass(frozen=True)
class Job:
    """A step that the worker runs.

    Attributes:
        idx: position in the pipeline, from 0.
        use: name of the phase file.
        phase: the step.
        planned: the ledger that the plan predicts after it.
    """

    idx: int
    use: str
    phase: WorkerPhase
    planned: Ledger


@dataclass(frozen=True)
class Events:
    """What the runner tells the parent.

    Attributes:
        planned: called with the plan, before anything is started.
        started: called with a step's name and position as it begins.
        finished: called with its record.
    """

    planned: Callable[[RunPlanned], None]
    started: Callable[[str, int], None]
    finished: Callable[[PhaseRecord], None]


def run(jobs: Sequence[Job], ctx: WorkerContext, events: Events, run_began: float) -> None:
    """Run the jobs in order.

    Args:
        jobs: the steps.
        ctx: what they share.
        events: where starts and records go.
        run_began: ``time.time()`` when the run began, for the elapsed time.

    Raises:
        CheckFailed: a check did not hold; its record has been emitted.
        KvpipeError: a phase failed; a record of the failure has been emitted.
    """
    compiles = CompileCounter()
    for job in jobs:
        events.started(job.phase.step, job.idx)
        began = time.monotonic()
        compiles.take()
        try:
            result = job.phase.run(ctx)
        except Exception as error:
            failed = Check(job.phase.step, "completed", type(error).__name__, False, str(error))
            result = Result(checks=(failed,))
            events.finished(_record(job, ctx, result, began, run_began, compiles))
            raise
        record = _record(job, ctx, result, began, run_began, compiles)
        events.finished(record)
        if not record.passed:
            raise CheckFailed(_explain(job.phase.step, record.checks))


def _record(
    job: Job,
    ctx: WorkerContext,
    result: Result,
    began: float,
    run_began: float,
    compiles: CompileCounter,
) -> PhaseRecord:
    duration = time.monotonic() - began
    compiled = compiles.take()
    measured = probe.measure(ctx)
    errors = differences(job.planned, measured.ledger) if measured.ledger else {}
    checks = tuple(result.checks)
    if measured.ledger and ctx.config.plan.enforce:
        checks += _plan_checks(job.planned, measured.ledger, errors)
    return PhaseRecord(
        phase=job.phase.step,
        use=job.use,
        idx=job.idx,
        elapsed_s=round(time.time() - run_began, 6),
        duration_s=round(duration, 6),
        memory=measured.memory,
        ledger=measured.ledger.totals() if measured.ledger else {},
        plan_error_bytes=errors,
        compilations=compiled.count,
        compile_s=round(compiled.seconds, 6),
        checks=checks,
        fields=result.fields,
    )


def _plan_checks(planned: Ledger, measured: Ledger, errors: Mapping[str, int]) -> tuple[Check, ...]:
    """Return one check for each pool that the plan holds to the byte, on every device."""
    return tuple(
        Check(f"plan/{pool}_bytes", planned.sum_of(pool), measured.sum_of(pool), not off)
        if not off or planned.sum_of(pool) != measured.sum_of(pool)
        else Check(f"plan/{pool}_bytes", planned.of(pool), measured.of(pool), False, "per device")
        for pool, off in errors.items()
    )


def _explain(step: str, checks: Sequence[Check]) -> str:
    failed = [check for check in checks if not check.passed]
    lines = [
        f"{check.name}: expected {_short(check.expected)}, it was {_short(check.actual)}"
        + (f" ({check.detail})" if check.detail else "")
        for check in failed
    ]
    return f"step {step!r}: " + "; ".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
