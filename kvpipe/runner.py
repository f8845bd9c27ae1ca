"""The loop in the worker: run each step, measure after it, compare with the plan, emit a record.

A record is emitted for the step that fails too: out of memory is exactly when memory matters. After
a failure the steps that clean are still run.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from kvpipe import probe, progress
from kvpipe.context import WorkerContext
from kvpipe.cycles import Cycles
from kvpipe.engine.compile_count import CompileCounter
from kvpipe.engine.peaks import PeakSampler
from kvpipe.errors import KvpipeError, failure_of
from kvpipe.ledger import Ledger, differences
from kvpipe.measurement import Measurement
from kvpipe.phase import Kind, Result, WorkerPhase
from kvpipe.process_memory import process_memory
from kvpipe.progress import COMPILING, PROGRAMS, Progress
from kvpipe.records import Check, Memory, PhaseRecord, RunPlanned
from kvpipe.schema import CONTINUE, PlanConfig
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
        planned: the ledger that the plan predicts after it; None once a failure has made the plan
            void.
    """

    idx: int
    use: str
    phase: WorkerPhase
    planned: Ledger | None


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


@dataclass(frozen=True)
class Failure:
    """The first step that failed.

    Attributes:
        step: its name.
        error: what the person at the terminal is told.
    """

    step: str
    error: KvpipeError


def run(
    jobs: Sequence[Job], ctx: WorkerContext, events: Events, run_began: float
) -> Failure | None:
    """Run the jobs in order, each with its record; return the first failure.

    After one only steps that clean are run. With ``runner.on_error=continue`` the failure of a step
    that only measures does not count as one until the end.

    Args:
        jobs: the steps.
        ctx: what they share.
        events: where starts and records go.
        run_began: ``time.time()`` when the run began, for the elapsed time.
    """
    first: Failure | None = None
    stopped = False
    with ExitStack() as threads:
        loop = _Loop(ctx, run_began, threads)
        threads.enter_context(Ticker("progress", lambda: loop.tell(events.progressed)))
        for job in jobs:
            if stopped and not (job.phase.kind is Kind.CLEANS and ctx.engine_lives):
                continue
            error = _carry_out(replace(job, planned=None) if stopped else job, loop, events)
            if error is not None:
                first = first or Failure(job.phase.step, error)
                stopped = stopped or not _goes_on(job.phase, ctx)
    return first


def _goes_on(phase: WorkerPhase, ctx: WorkerContext) -> bool:
    """Whether the run goes on after this step has failed."""
    asked = ctx.config.runner.on_error == CONTINUE
    return asked and phase.kind is Kind.MEASURES and ctx.engine_lives


def _carry_out(job: Job, loop: "_Loop", events: Events) -> KvpipeError | None:
    """Run one job and emit its record; return what failed it."""
    step = job.phase.step
    events.started(step, job.idx)
    loop.begin(step)
    try:
        record = loop.record(job, job.phase.run(loop.ctx))
    except Exception as error:
        traceback.print_exc()
        events.finished(loop.failure_record(job, error))
        return error if isinstance(error, KvpipeError) else failure_of(step, error)
    events.finished(record)
    return None if record.passed else CheckFailed(_explain(step, record.checks))


class _Loop:
    """What the loop keeps from step to step: clocks, counts, the last measurement, past cycles."""

    def __init__(self, ctx: WorkerContext, run_began: float, threads: ExitStack) -> None:
        self.ctx = ctx
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
        measured = probe.measure(self.ctx)
        cycle = self._cycles.compare(job.phase.step, measured)
        checks = (*result.checks, *cycle.checks)
        errors: dict[str, int] = {}
        if measured.ledger and job.planned:
            errors = differences(job.planned, measured.ledger)
            if self.ctx.config.plan.enforce:
                checks += _plan_checks(job.planned, measured.ledger, errors)
                checks += (_total_check(job.planned, measured.ledger, self.ctx.config.plan),)
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
        told = str(error)
        try:
            measured = probe.measure(self.ctx, settle=False)
        except Exception as second:
            # The record of the failure must not be lost to what the failure has broken.
            traceback.print_exc()
            told += f"; then nothing could be measured: {type(second).__name__}: {second}"
            measured = Measurement(process_memory(), None)
        return PhaseRecord(
            **timed,
            **self._placed(measured),
            checks=(Check(job.phase.step, "completed", type(error).__name__, False, told),),
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
