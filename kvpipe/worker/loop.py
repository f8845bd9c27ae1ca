"""The worker's loop: run each step, measure after it, compare with the plan, emit a record.

A step that fails gets its record too: out of memory is exactly when memory records matter. After a
failure, only steps that are declared to run always still run.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvpipe.config.schema import CONTINUE, PlanConfig
from kvpipe.engine import multihost
from kvpipe.engine.compile_count import CompileCounter
from kvpipe.engine.peaks import PeakSampler
from kvpipe.errors import (
    CheckFailed,
    Ending,
    InputError,
    KvpipeError,
    WeightsError,
    ending_of,
    failure_of,
)
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import SAVED, base_name, cycle_of
from kvpipe.pipeline.ledger import (
    OTHER,
    PROGRAM,
    TRAINER_PROGRAM,
    UNOWNED,
    Ledger,
    differences,
)
from kvpipe.pipeline.phase import OnFailure, Result, WorkerPhase, result_of
from kvpipe.pipeline.steps import saving_step, use_of
from kvpipe.records import progress
from kvpipe.records.json_record import decode
from kvpipe.records.progress import COMPILING, PROGRAMS, Progress
from kvpipe.records.run import Check, Memory, Peak, PhaseRecord, RunPlanned
from kvpipe.system.periodic_thread import PeriodicThread
from kvpipe.system.process_memory import process_memory
from kvpipe.worker import measurement
from kvpipe.worker.drift import Drift
from kvpipe.worker.host_results import HostResult, merge, per_host
from kvpipe.worker.measurement import Measurement

_REPORT_EVERY_S = 0.25
# Of all devices, where no plan predicts the programs: those of Qwen2.5-3B take 336,592,640 bytes.
_UNPLANNED_PROGRAMS_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Job:
    """A step that the worker runs: its position, its phase file, and the planned ledger after it.

    No ledger is planned once a failure has invalidated the plan. ``peak_bytes`` are the most that it
    may hold on a device at any time; 0 if they are not planned or not checked.
    """

    idx: int
    use: str
    phase: WorkerPhase
    planned: Ledger | None
    peak_bytes: int = 0


class StopAsked(Exception):
    """The parent wants no further step: a signal came, and the trainer may be worth saving."""


@dataclass(frozen=True)
class Callbacks:
    """Callbacks through which the runner reports to the parent.

    Attributes:
        joined: called with the host names by rank; not called for a single host.
        planned: called with the plan, before anything is started.
        started: called with a step's name and position as it begins; it may raise StopAsked.
        progressed: called while it runs, a few times a second, from another thread.
        sampled: called with its name and each sample of its rollout, before its record.
        finished: called with its record.
    """

    joined: Callable[[Sequence[str]], None]
    planned: Callable[[RunPlanned], None]
    started: Callable[[str, int], None]
    progressed: Callable[[Progress], None]
    sampled: Callable[[str, Mapping[str, Any]], None]
    finished: Callable[[PhaseRecord], None]


def run(jobs: Sequence[Job], ctx: WorkerContext, callbacks: Callbacks, run_began: float) -> Ending:
    """Run the jobs in order, each with its record; return the ending by the first failure, if any.

    After a failure only steps with ``OnFailure.ALWAYS_RUN`` run. With ``runner.on_error=continue``
    the failure of a step with ``OnFailure.MAY_CONTINUE`` does not stop the run, but fails it at the
    end. Several hosts exchange their results at the end of each step, so all take the same
    decision.

    If the parent asks to stop, the trainer is saved if it is still as the last cycle left it.

    Elapsed times count from ``run_began``, of ``time.monotonic()``.
    """
    ending = Ending()
    stopped = False
    with ExitStack() as threads:
        loop = Loop(ctx, run_began, threads)
        threads.enter_context(PeriodicThread("progress", lambda: loop.report(callbacks.progressed)))
        for job in jobs:
            if stopped and not (job.phase.on_failure is OnFailure.ALWAYS_RUN and loop.engine_lives):
                continue
            try:
                error = carry_out(replace(job, planned=None) if stopped else job, loop, callbacks)
            except StopAsked:
                error = None if stopped else _save_at(job, loop, callbacks)
                return ending_of(error, SAVED) if error else ending
            if error is None:
                loop.passed(job)
            else:
                ending = ending if ending.exit_code else ending_of(error, job.phase.step)
                stopped = stopped or not _goes_on(job.phase, loop)
    return ending


def _goes_on(phase: WorkerPhase, loop: "Loop") -> bool:
    """Whether the run continues after this step has failed."""
    asked = loop.ctx.config.runner.on_error == CONTINUE
    return asked and phase.on_failure is OnFailure.MAY_CONTINUE and loop.engine_lives


def _save_at(job: Job, loop: "Loop", callbacks: Callbacks) -> KvpipeError | None:
    """Save the trainer in place of a job, if it is as at the end of a cycle that is not saved."""
    cycle = loop.unsaved_cycle()
    if cycle is None:
        return None
    config = loop.ctx.config
    step = saving_step(config, cycle)
    assert isinstance(step, WorkerPhase)
    return carry_out(Job(job.idx, use_of(SAVED, config), step, loop.planned), loop, callbacks)


def carry_out(job: Job, loop: "Loop", callbacks: Callbacks) -> KvpipeError | None:
    """Run one job and emit its record; return its error, if it failed.

    One that has no planned ledger is not compared with an earlier cycle either.
    """
    step = job.phase.step
    callbacks.started(step, job.idx)
    loop.begin(step)
    own = loop.attempt(job)
    host_results, error = [own.host_result], own.error
    if multihost.several():
        failed = multihost.failure(error) if error else {}
        received = multihost.gather({**failed, "host_result": asdict(own.host_result)})
        host_results = [
            own.host_result if host == multihost.rank() else decode(HostResult, at["host_result"])
            for host, at in enumerate(received)
        ]
        error = multihost.first_failure(received)
    record = loop.record(job, own, host_results, error)
    for sample in own.samples:
        callbacks.sampled(step, sample)
    callbacks.finished(record)
    if error is not None:
        return error
    return None if record.passed else CheckFailed(explain(step, record.checks))


@dataclass(frozen=True)
class _Attempt:
    """This host's result of a step; duration and compilations by the record's field names."""

    timed: Mapping[str, Any]
    host_result: HostResult
    fields: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    error: KvpipeError | None


class Loop:
    """State that the loop keeps between steps: clocks, counts, the last measurement, past cycles.

    Attributes:
        engine_lives: whether no host's engine has failed.
        planned: the planned ledger after the last step that passed.
    """

    def __init__(self, ctx: WorkerContext, run_began: float, threads: ExitStack) -> None:
        self.ctx = ctx
        self._run_began = run_began
        self._compiles = CompileCounter()
        self._drift = Drift(ctx.config.resume_after or 0)
        self._ended: tuple[int, int] | None = None
        self._saved_cycle = ctx.config.resume_after or 0
        self.planned: Ledger | None = None
        self._step_began = 0.0
        self._step_ended: float | None = None
        self._outside_s = 0.0
        self._step = ""
        self._memory: Memory | None = None
        self.engine_lives = True
        self._sampler: PeakSampler | None = None
        if ctx.config.runner.sample_peaks:
            self._sampler = threads.enter_context(PeakSampler(lambda: ctx.jax_ready))

    def passed(self, job: Job) -> None:
        """Note a step that passed: where the plan is, and with it the end of a cycle, or a save."""
        self.planned = job.planned
        step, repeat = job.phase.step, self.ctx.config.repeat
        if base_name(step) == SAVED:
            self._saved_cycle = cycle_of(step)
        if repeat and base_name(step) == repeat.last and self.ctx.made_trainer is not None:
            self._ended = cycle_of(step), self.ctx.made_trainer.steps

    def unsaved_cycle(self) -> int | None:
        """Return the last cycle if it is not saved, and its trainer has not stepped since."""
        trainer = self.ctx.made_trainer
        if self._ended is None or trainer is None:
            return None
        cycle, steps = self._ended
        return cycle if cycle > self._saved_cycle and trainer.steps == steps else None

    def begin(self, step: str) -> None:
        """Start the clock and the counts of a step."""
        self._step = step
        if self._sampler:
            self._sampler.begin(self._memory)
        self._compiles.take()
        self._step_began = time.monotonic()
        self._outside_s = self._step_began - (self._step_ended or self._step_began)

    def report(self, progressed: Callable[[Progress], None]) -> float:
        """Report the step's progress, if it has any; return the seconds until the next report."""
        step, activity, compiled = self._step, progress.now(), self._compiles.so_far
        if (compiling_s := self._compiles.compiling_s) is not None:
            seconds = round(compiled.seconds + compiling_s, 3)
            programs = {PROGRAMS: compiled.programs}
            progressed(Progress(step, COMPILING, seconds, programs))
        elif activity is not None:
            progressed(activity.progress(step))
        return _REPORT_EVERY_S

    def attempt(self, job: Job) -> _Attempt:
        """Run a step on this host and measure after it."""
        result, error, measured = Result(), None, None
        try:
            result = result_of(job.phase, self.ctx)
            # What it has only dispatched is its work too; after a failure it may never be done.
            measurement.settle(self.ctx)
        except Exception as raised:
            error = raised
        timed = self._timed(job)
        if error is None:
            try:
                measured = measurement.measure(self.ctx, describes=job.planned is not None)
            except Exception as raised:
                error = raised
        checks = result.checks
        if measured is None:
            assert error is not None
            traceback.print_exception(error)
            measured, detail = self._measured_after(error)
            checks = (Check(job.phase.step, "completed", type(error).__name__, False, detail),)
        positions = multihost.positions_here() if measured.ledger else ()
        self._memory = measured.memory
        peak = self._sampler.take(measured.memory) if self._sampler else None
        host_result = HostResult(measured, peak, checks, self.ctx.engine_lives, positions)
        if isinstance(error, InputError) and self.ctx.started is not None:
            # Wrong input is refused before the engine starts; only weights are read later.
            error = WeightsError(f"step {job.phase.step!r}: {error}")
        if error is not None and not isinstance(error, KvpipeError):
            error = failure_of(job.phase.step, error)
        return _Attempt(timed, host_result, result.fields, result.samples, error)

    def _measured_after(self, error: Exception) -> tuple[Measurement, str]:
        """Measure after a failed step, without waiting for the engine to become idle."""
        try:
            return measurement.measure(self.ctx), str(error)
        except Exception as second:
            # Keep the failure's record even if the failure has also broken the measurement.
            traceback.print_exc()
            detail = f"{error}; then the measurement failed: {type(second).__name__}: {second}"
            return Measurement(process_memory(), None), detail

    def record(
        self, job: Job, own: _Attempt, host_results: Sequence[HostResult], error: KvpipeError | None
    ) -> PhaseRecord:
        """Return the record of a step over all hosts, compared with the plan if no host failed."""
        labels = [multihost.label(host) for host in range(len(host_results))]
        whole = merge(host_results, labels)
        self.engine_lives = whole.engine_lives
        compared = self._compared(job, whole) if error is None else Result(checks=whole.checks)
        fields = {**own.fields, **compared.fields} if error is None else {}
        if multihost.several():
            fields["hosts"] = per_host(host_results, labels)
        ledger = whole.measured.ledger
        off: dict[str, int] = {}
        if error is None and ledger and job.planned:
            off = differences(job.planned, ledger)
            off["total"] = ledger.total_bytes - job.planned.total_bytes
        return PhaseRecord(
            **own.timed,
            elapsed_s=round(time.monotonic() - self._run_began, 6),
            memory=whole.measured.memory,
            peak=whole.peak,
            ledger=ledger.totals() if ledger else {},
            other_bytes=whole.measured.other,
            plan_error_bytes=off,
            checks=compared.checks,
            fields=fields,
        )

    def _compared(self, job: Job, whole: HostResult) -> Result:
        """Return the checks, including those against the plan and the previous cycle."""
        cycle = Result()
        if job.planned:
            cycle = self._drift.compare(job.phase.step, whole.measured, self._compiles.total)
        checks = (*whole.checks, *cycle.checks)
        ledger, config = whole.measured.ledger, self.ctx.config.plan
        if ledger and job.planned and config.enforce:
            checks += _plan_checks(job.planned, ledger, differences(job.planned, ledger))
            checks += (_owned_check(whole.measured), _total_check(job.planned, ledger, config))
            if job.peak_bytes and whole.peak:
                hosts = self.ctx.config.engine.nnodes
                checks += (_peak_check(job.peak_bytes, ledger, whole.peak, config, hosts),)
        return Result(cycle.fields, checks)

    def _timed(self, job: Job) -> dict[str, Any]:
        """Stop the clock and the counts of a step; return them by the record's field names."""
        self._step_ended = time.monotonic()
        duration_s = self._step_ended - self._step_began
        compiled = self._compiles.take()
        return {
            "phase": job.phase.step,
            "use": job.use,
            "idx": job.idx,
            "duration_s": round(duration_s, 6),
            "compilations": compiled.count,
            "compile_s": round(compiled.seconds, 6),
            "programs_loaded": compiled.loaded,
            "outside_s": round(self._outside_s, 6),
        }


def _plan_checks(planned: Ledger, measured: Ledger, errors: Mapping[str, int]) -> tuple[Check, ...]:
    """Return one check per pool that the plan predicts exactly, over every device."""
    return tuple(
        Check(f"plan/{pool}_bytes", planned.sum_of(pool), measured.sum_of(pool), not off)
        if not off or planned.sum_of(pool) != measured.sum_of(pool)
        else Check(f"plan/{pool}_bytes", planned.of(pool), measured.of(pool), False, "per device")
        for pool, off in errors.items()
    )


def _owned_check(measured: Measurement) -> Check:
    """Return the check that every live array is in a pool or has an owner."""
    unowned = measured.other.get(UNOWNED, 0)
    return Check("plan/unowned_bytes", 0, unowned, not unowned, "; ".join(measured.unowned))


def _total_check(planned: Ledger, measured: Ledger, config: PlanConfig) -> Check:
    """Return the check of the total against the plan.

    The arrays of the pool other are expected, as each needs an owner. What the devices count beyond
    the arrays may differ from the planned programs by the allowance, or be as much as the programs of
    a large model where the plan has none. A device that does not count them has none.
    """
    expected = planned.total_bytes + measured.sum_of(OTHER)
    programs = planned.sum_of(PROGRAM) + planned.sum_of(TRAINER_PROGRAM)
    allowed, why = config.allowance_bytes, f"plan.allowance_bytes is {config.allowance_bytes}"
    if PROGRAM not in measured.pools:
        expected -= programs
        allowed, why = 0, "this device counts no programs, so it must be exact"
    elif not programs:
        allowed = _UNPLANNED_PROGRAMS_BYTES
        why = f"of programs, which the plan lacks, {allowed} are allowed"
    off = measured.total_bytes - expected
    return Check(
        "plan/total_bytes",
        expected,
        measured.total_bytes,
        abs(off) <= allowed,
        f"{off:+} bytes; {why}",
    )


def _peak_check(
    planned_bytes: int, ledger: Ledger, peak: Peak, config: PlanConfig, hosts: int
) -> Check:
    """Return the check that no device held more than is planned, while the step ran.

    Beside it there may be the arrays of the pool other, and programs where the device counts them.
    jax makes such an array from a scalar, or from a copy on one device: for a moment both are there.
    It compares an array that several hosts place: it gathers it from each, and reads a view of that.
    """
    copies = 2 + (2 * hosts if hosts > 1 else 0)
    most = planned_bytes + copies * max(ledger.of(OTHER))
    if PROGRAM in ledger.pools:
        most += max(ledger.of(PROGRAM)) + config.allowance_bytes
    held = max(peak.bytes_in_use, default=0)
    return Check("plan/peak_bytes", f"at most {most}", held, held <= most, "on the fullest device")


def explain(step: str, checks: Sequence[Check]) -> str:
    """Return the message about those checks of a step that did not pass."""
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
