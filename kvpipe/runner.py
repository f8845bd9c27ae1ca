"""The loop in the worker: run each step, measure after it, compare with the plan, emit a record.

A record is emitted for the step that fails too: out of memory is exactly when memory matters.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kvpipe import probe, progress
from kvpipe.context import WorkerContext
from kvpipe.cycles import Cycles
from kvpipe.engine.compile_count import CompileCounter
from kvpipe.engine.peaks import PeakSampler
from kvpipe.errors import KvpipeError
from kvpipe.ledger import Ledger, differences
from kvpipe.measurement import Measurement
from kvpipe.phase import Result, WorkerPhase
from kvpipe.progress import COMPILING, PROGRAMS, Progress
from kvpipe.records import Check, Memory, PhaseRecord, RunPlanned
from kvpipe.schema import PlanConfig
from kvpipe.ticker import Ticker

_TELL_EVERY_S = 0.25


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
        progressed: called while it runs, a few times a second, from another thread.
        finished: called with its record.
    """

    planned: Callable[[RunPlanned], None]
    started: Callable[[str, int], None]
    progressed: Callable[[Progress], None]
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
    with ExitStack() as threads:
        loop = _Loop(ctx, run_began, threads)
        threads.enter_context(Ticker("progress", lambda: loop.tell(events.progressed)))
        for job in jobs:
            events.started(job.phase.step, job.idx)
            loop.begin(job.phase.step)
            try:
                result = job.phase.run(ctx)
            except Exception as error:
                events.finished(loop.failure_record(job, error))
                raise
            record = loop.record(job, result)
            events.finished(record)
            if not record.passed:
                raise CheckFailed(_explain(job.phase.step, record.checks))


class _Loop:
    """What the loop keeps from step to step: clocks, counts, the last measurement, past cycles."""

    def __init__(self, ctx: WorkerContext, run_began: float, threads: ExitStack) -> None:
        self._ctx = ctx
        self._run_began = run_began
        self._compiles = CompileCounter()
        self._cycles = Cycles()
        self._step_began = 0.0
        self._step = ""
        self._memory: Memory | None = None
        self._sampler: PeakSampler | None = None
        if ctx.config.runner.sample_peaks:
            self._sampler = threads.enter_context(PeakSampler(lambda: ctx.jax_ready))

    def begin(self, step: str) -> None:
        """Start the clock and the counts of a step."""
        self._step = step
        if self._sampler:
            self._sampler.begin(self._memory)
        self._compiles.take()
        self._step_began = time.monotonic()

    def tell(self, progressed: Callable[[Progress], None]) -> float:
        """Tell how far the step is, if it says so; return the seconds until the next time."""
        step, activity, compiled = self._step, progress.now(), self._compiles.so_far
        if (compiling_s := self._compiles.compiling_s) is not None:
            seconds = round(compiled.seconds + compiling_s, 3)
            progressed(Progress(step, COMPILING, seconds, {PROGRAMS: compiled.count}))
        elif activity is not None:
            progressed(activity.progress(step))
        return _TELL_EVERY_S

    def record(self, job: Job, result: Result) -> PhaseRecord:
        """Measure after a step, compare with the plan and with the cycle before."""
        timed = self._timed(job)
        measured = probe.measure(self._ctx)
        cycle = self._cycles.compare(job.phase.step, measured)
        checks = (*result.checks, *cycle.checks)
        errors: dict[str, int] = {}
        if measured.ledger:
            errors = differences(job.planned, measured.ledger)
            if self._ctx.config.plan.enforce:
                checks += _plan_checks(job.planned, measured.ledger, errors)
                checks += (_total_check(job.planned, measured.ledger, self._ctx.config.plan),)
            errors["total"] = measured.ledger.total_bytes - job.planned.total_bytes
        return PhaseRecord(
            **timed,
            **self._placed(measured),
            plan_error_bytes=errors,
            checks=checks,
            fields={**result.fields, **cycle.fields},
        )

    def failure_record(self, job: Job, error: Exception) -> PhaseRecord:
        """Measure after a step that failed, without waiting for the engine to settle."""
        timed = self._timed(job)
        measured = probe.measure(self._ctx, settle=False)
        return PhaseRecord(
            **timed,
            **self._placed(measured),
            checks=(Check(job.phase.step, "completed", type(error).__name__, False, str(error)),),
        )

    def _timed(self, job: Job) -> dict[str, Any]:
        """Stop the clock and the count of a step; return what they say, by the record's names."""
        duration_s = time.monotonic() - self._step_began
        compiled = self._compiles.take()
        return {
            "phase": job.phase.step,
            "use": job.use,
            "idx": job.idx,
            "duration_s": round(duration_s, 6),
            "compilations": compiled.count,
            "compile_s": round(compiled.seconds, 6),
        }

    def _placed(self, measured: Measurement) -> dict[str, Any]:
        """Return a measurement, the time of it and the peak up to it, by the record's names."""
        self._memory = measured.memory
        return {
            "elapsed_s": round(time.time() - self._run_began, 6),
            "memory": measured.memory,
            "peak": self._sampler.take(measured.memory) if self._sampler else None,
            "ledger": measured.ledger.totals() if measured.ledger else {},
        }


def _plan_checks(planned: Ledger, measured: Ledger, errors: Mapping[str, int]) -> tuple[Check, ...]:
    """Return one check for each pool that the plan holds to the byte, on every device."""
    return tuple(
        Check(f"plan/{pool}_bytes", planned.sum_of(pool), measured.sum_of(pool), not off)
        if not off or planned.sum_of(pool) != measured.sum_of(pool)
        else Check(f"plan/{pool}_bytes", planned.of(pool), measured.of(pool), False, "per device")
        for pool, off in errors.items()
    )


def _total_check(planned: Ledger, measured: Ledger, config: PlanConfig) -> Check:
    """Return the check that the total is the planned one, but for the stated allowance."""
    off = measured.total_bytes - planned.total_bytes
    return Check(
        "plan/total_bytes",
        planned.total_bytes,
        measured.total_bytes,
        abs(off) <= config.allowance_bytes,
        f"{off:+} bytes, plan.allowance_bytes is {config.allowance_bytes}",
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
