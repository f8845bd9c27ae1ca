"""The parent's side of a run: run its own phases, start the worker, feed the sinks.

It must not import jax. Whatever happens to the worker, the run always finishes with a
``run_finished`` record, closed sinks and the right exit code.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from kvpipe import errors
from kvpipe.config.hosts import own_file, who_ended
from kvpipe.config.jax_environment import jax_environment
from kvpipe.config.schema import Kvpipe
from kvpipe.errors import (
    Ending,
    EngineError,
    Interrupted,
    KvpipeError,
    OutOfMemory,
    TimedOut,
    ending_of,
    failure_of,
)
from kvpipe.parent.child_process import Child, start_child
from kvpipe.parent.deferred_signals import DeferredSignals
from kvpipe.parent.limits import Limits
from kvpipe.parent.preemption import Preemption
from kvpipe.pipeline.context import ParentContext
from kvpipe.pipeline.phase import ParentPhase, Phase, Result, result_of
from kvpipe.pipeline.steps import use_of
from kvpipe.records.progress import Progress
from kvpipe.records.run import (
    ENGINE_LOG,
    FAILED,
    INTERRUPTED,
    PASSED,
    RUN_PLANNED,
    SKIPPED,
    Check,
    Memory,
    PhaseRecord,
    PlannedPhase,
    Record,
    RunFinished,
    RunPlanned,
    RunStarted,
    record_from_json,
)
from kvpipe.sinks import Sink, failed_by
from kvpipe.system.libtpu_lock import libtpu_lock
from kvpipe.system.pipes import BEGIN, STACKS_FILE, STOP, is_readable
from kvpipe.system.process_memory import child_memory, oom_kills, process_memory
from kvpipe.system.secrets import Redactor, without_key

_SAME_SIGNAL_S = 0.1
# A step that takes less has its record written first.
_QUIET_S = 0.02


@dataclass
class Run:
    """A run in progress.

    Its config is typed and, for the worker, plain. The sinks include the tracker;
    ``start_tracking`` starts the W&B run and returns the fields of its phase record. ``command``
    repeats the run, ``resume_command`` continues it after its checkpoint. ``worker_module`` runs as
    the worker's process.
    """

    worker_module: ClassVar[str] = "kvpipe.worker.entry"

    config: Kvpipe
    plain: dict[str, Any]
    started: RunStarted
    steps: Sequence[Phase]
    run_dir: Path
    sinks: Sink
    start_tracking: Callable[[], dict[str, Any]]
    command: str = ""
    resume_command: str = ""
    redactor: Redactor = field(default_factory=Redactor)
    began: float = field(default_factory=time.monotonic)
    checks: list[Check] = field(default_factory=list)
    _signals: DeferredSignals = field(default_factory=DeferredSignals)
    _current: str = ""
    _unfinished: Callable[[Check], PhaseRecord] | None = None
    _worker_memory: Memory | None = None
    _ledgers: dict[str, Mapping[str, int]] = field(default_factory=dict)
    _plan: RunPlanned | None = None
    _tracking: dict[str, Any] | None = None
    _hosts: tuple[str, ...] = ()

    def carry_out(self) -> RunFinished:
        """Execute the run and return its last record, after every sink has received it.

        Raises:
            KvpipeError: a sink failed on the last record of a run that had not failed.
        """
        self._limits = Limits(self.config.runner)
        self._preemption = Preemption(self.config)
        with self._signals:
            finished = self._finished(self._end_of_phases())
            try:
                self.sinks.run_finished(finished)
            except KvpipeError as error:
                # The other sinks have received it; a run that failed before keeps its exit code.
                if not finished.exit_code:
                    raise
                finished = failed_by(finished, error)
        return finished

    def _finished(self, ending: Ending) -> RunFinished:
        """Return the last record; first emit a record for a phase that never finished."""
        ending = self._preemption.with_hint(self._with_memory(ending), self.resume_command)
        if ending.exit_code and self._unfinished is not None:
            error = ending.error or ""
            check = Check(self._current, "completed", ending.kind, False, error)
            try:
                self._on_own_record(self._unfinished(check))
            except KvpipeError as error:
                ending = replace(ending, error=f"{ending.error}; then: {error}")
        failing = (ending.failing_phase or self._current) if ending.exit_code else None
        finished = RunFinished(
            status=self._status(ending.exit_code),
            exit_code=ending.exit_code,
            run_dir=str(self.run_dir),
            elapsed_s=round(time.monotonic() - self.began, 6),
            checks=tuple(self.checks),
            error=ending.error,
            failing_phase=failing or None,
            ledger=self._ledger(failing),
            planned=self._planned(failing),
            command=self.command,
            fields={"wandb": self._tracking} if self._tracking else {},
        )
        clean = self.redactor.text(finished.line)
        return RunFinished.from_json(json.loads(clean))

    def _status(self, exit_code: int) -> str:
        if exit_code > errors.SIGNALLED:
            return INTERRUPTED
        # The worker starts nothing once it has reported a plan that does not fit.
        refused = self._plan is not None and not self._plan.fit.fits and self.config.plan.enforce
        if refused and exit_code == errors.BAD_INPUT:
            return SKIPPED
        return FAILED if exit_code else PASSED

    def _with_memory(self, ending: Ending) -> Ending:
        """Add the measured and planned memory to the error of an out-of-memory."""
        if ending.exit_code != errors.OUT_OF_MEMORY:
            return ending
        failing = ending.failing_phase or self._current
        held = ", ".join(f"{pool} {size:,}" for pool, size in self._ledger(failing).items())
        error = f"{ending.error}\nlast measured, bytes over all devices: {held or 'none'}"
        if planned := self._planned(failing):
            error += (
                f"\nplanned after {failing!r}: {planned.total_bytes:,} bytes over all devices, "
                f"{planned.max_device_bytes:,} on the fullest"
            )
        return replace(ending, error=error)

    def _ledger(self, step: str | None) -> Mapping[str, int]:
        """Return the ledger measured after ``step``, or the last one measured."""
        last = next(reversed(self._ledgers.values()), {})
        return self._ledgers.get(step or "", last)

    def _planned(self, step: str | None) -> PlannedPhase | None:
        phases = self._plan.phases if self._plan else ()
        return next((phase for phase in phases if phase.name == step), None)

    def _end_of_phases(self) -> Ending:
        try:
            self.sinks.run_started(self.started)
            has_worker = any(step.runs_in == "worker" for step in self.steps)
            if has_worker and self.config.runner.isolate:
                return self._run_worker()
            self._run_parent_phases()
            return self._run_here() if has_worker else Ending()
        except (KvpipeError, Interrupted) as error:
            return ending_of(error)
        except Exception as error:
            # A defect of kvpipe: print the traceback for the developer; the record is for the user.
            print(self.redactor.text(traceback.format_exc()), end="", file=sys.stderr)
            return ending_of(error)

    def _run_parent_phases(self) -> None:
        for idx, step in enumerate(self.steps):
            if not isinstance(step, ParentPhase):
                continue
            self._on_own_start(step.step, idx)
            began = time.monotonic()
            try:
                with self._signals.allowed(), self._limits.in_parent():
                    result = result_of(step, ParentContext(self.config, self._start_tracking))
            except Exception as error:
                if isinstance(error, KvpipeError):
                    raise
                print(self.redactor.text(traceback.format_exc()), end="", file=sys.stderr)
                raise failure_of(step.step, error) from error
            duration_s = time.monotonic() - began
            self._on_own_record(self._own_record(step.step, idx, duration_s, result))

    def _start_tracking(self) -> dict[str, Any]:
        self._tracking = self.start_tracking()
        return self._tracking

    def _own_record(
        self, step: str, idx: int, duration_s: float, result: Result, memory: Memory | None = None
    ) -> PhaseRecord:
        """Return the record of a step that runs in the parent."""
        return PhaseRecord(
            phase=step,
            use=use_of(step, self.config),
            idx=idx,
            elapsed_s=round(time.monotonic() - self.began, 6),
            duration_s=round(duration_s, 6),
            memory=memory or process_memory(),
            checks=result.checks,
            fields=result.fields,
        )

    def _run_worker(self) -> Ending:
        with libtpu_lock(self.config.engine.device):
            try:
                return self._run_child()
            finally:
                for name in (ENGINE_LOG, STACKS_FILE):
                    self.redactor.file(self._file(name))

    def _run_child(self) -> Ending:
        kills = oom_kills()
        with self._start_worker() as child:
            scratch = str(child.scratch)
            # A config that is larger than a pipe's buffer waits for the worker to read it.
            with self._signals.allowed(), self._limits.in_parent():
                child.send({"config": self.plain, "run_began": self.began, "scratch": scratch})
            # W&B takes seconds to answer; meanwhile the worker imports jax and the engine.
            self._run_parent_phases()
            self._begin_stage(RUN_PLANNED)
            child.send({BEGIN: RUN_PLANNED})
            try:
                for line in child.lines(partial(self._wait, child)):
                    message = self._on_line(line)
                    if "started" in message:
                        # All records before it are written.
                        child.send({BEGIN: message["started"]})
                        self._show_started(message["started"], message["idx"])
                    elif "exit_code" in message:
                        return self._preemption.ending(Ending(**message))
            except TimedOut as error:
                self._worker_memory = child_memory(child.process.pid)
                raise TimedOut(f"{error}; {self._save_stacks(child)}") from None
            except Interrupted:
                self._worker_memory = child_memory(child.process.pid)
                raise
            if self._preemption.signal is not None:
                raise self._preemption.signal
            died = _died(child, self._current, oom_kills() > kills, self._hosts)
            with self._signals.allowed():
                # A cluster signals both processes, and the worker may end first.
                time.sleep(_SAME_SIGNAL_S)
            raise died

    def _on_line(self, line: str) -> Mapping[str, Any]:
        """Handle a line of the worker; return its message, as the line itself without secrets."""
        clean = self.redactor.text(line)
        message = json.loads(clean)
        if "phase" in message:
            self._on_record(record_from_json(message, clean))
        elif "started" in message:
            self._on_started(message["started"], message["idx"])
        elif "stopped" in message:
            self._preemption.obeyed = True
        elif "hosts" in message:
            self._on_hosts(message["hosts"])
        elif "sample" in message:
            self._on_sample(message["of"], message["sample"])
        elif "progress" in message:
            self.sinks.phase_progressed(Progress(**message["progress"]))
        return message

    def _wait(self, child: Child, descriptor: int) -> None:
        """Wait until the worker sends something or ends, unless a limit or a signal comes first.

        What it has sent is read first: it may be in the next step already. Once its step is under way,
        the sinks receive the records that may reach them late. After a signal the worker may end its
        step, if a cycle has ended that is not saved.
        """
        if not is_readable(descriptor, _QUIET_S):
            self.sinks.catch_up()
        try:
            if self._preemption.signal is None:
                with self._signals.allowed():
                    return self._limits.wait(descriptor)
        except Interrupted as interrupted:
            if is_readable(descriptor, 0.0):
                return None  # the signal is raised again after that
            if not self._preemption.takes(interrupted):
                raise
            child.send({STOP: self._current})
        return self._limits.wait(descriptor)

    def _save_stacks(self, child: Child) -> str:
        """Save the stacks of the worker's threads; return a sentence that says where."""
        stacks = child.write_stacks()
        if not stacks:
            return "its threads wrote no stacks"
        path = self._file(STACKS_FILE)
        try:
            path.write_text(stacks, encoding="utf-8")
        except OSError as error:
            return f"the stacks of its threads cannot be written to {path}: {error.strerror}"
        return f"the stacks of its threads are in {path}"

    def _start_worker(self) -> AbstractContextManager[Child]:
        return start_child(
            self.worker_module,
            self._file(ENGINE_LOG),
            without_key(os.environ) | jax_environment(self.config.engine, os.environ),
            self.config.runner.shutdown_timeout_s,
        )

    def _file(self, name: str) -> Path:
        return self.run_dir / own_file(name, self.config.engine)

    def _run_here(self) -> Ending:
        # A dynamic import: the parent loads jax only here, for a debugger.
        os.environ.update(jax_environment(self.config.engine, os.environ))
        worker = importlib.import_module("kvpipe.worker.work")
        callbacks = worker.loop.Callbacks(
            self._on_hosts,
            self._on_own_record,
            self._on_own_start,
            self.sinks.phase_progressed,
            self._on_sample,
            self._on_own_record,
        )
        with self._signals.allowed():
            return worker.execute(self.config, callbacks, self.began)

    def _on_sample(self, step: str, sample: Mapping[str, Any]) -> None:
        self.sinks.sampled(step, json.dumps(sample, ensure_ascii=False))

    def _on_hosts(self, names: Sequence[str]) -> None:
        self._hosts = tuple(names)

    def _begin_stage(self, name: str) -> None:
        """Record the current stage, and start its time limit."""
        self._current = name
        self._unfinished = None
        self._limits.begin(name)

    def _on_own_start(self, step: str, idx: int) -> None:
        self._on_started(step, idx)
        self._show_started(step, idx)

    def _on_started(self, step: str, idx: int) -> None:
        self._begin_stage(step)
        began = time.monotonic()

        def unfinished(check: Check) -> PhaseRecord:
            duration_s = time.monotonic() - began
            result = Result(checks=(check,))
            return self._own_record(step, idx, duration_s, result, self._worker_memory)

        self._unfinished = unfinished

    def _show_started(self, step: str, idx: int) -> None:
        self.sinks.phase_started(step, idx, len(self.started.steps) + len(self.started.skipped))

    def _on_own_record(self, record: RunPlanned | PhaseRecord) -> None:
        """Handle a record of this process in the same way as one of the worker's process."""
        self._on_line(record.line)
        self.sinks.catch_up()

    def _on_record(self, record: Record) -> None:
        if isinstance(record, RunPlanned):
            self._plan = record
            self.sinks.run_planned(record)
            return
        assert isinstance(record, PhaseRecord)
        self._unfinished = None
        self._preemption.passed(record)
        self.checks.extend(record.checks)
        if record.memory.bytes_in_use_source is not None:
            self._ledgers[record.phase] = record.ledger
        self.sinks.phase_finished(record)


def _died(child: Child, step: str, memory_was_short: bool, hosts: Sequence[str]) -> KvpipeError:
    """Return the error of a worker that died before it reported how its part ended."""
    tail = child.log_tail()
    if other := who_ended(child.log_text(), hosts):
        return EngineError(
            f"{other}, so jax ended the engine's process here, in step {step!r}; its log "
            f"{child.log} ends with:\n{tail}"
        )
    ended = f"the engine's process ended by {child.how_it_ended()} in step {step!r}"
    log = f"its log {child.log} ends with:\n{tail}"
    if child.ended_by() != -signal.SIGKILL:
        error = OutOfMemory if errors.says_no_memory(tail) else EngineError
        return error(f"{ended}; {log}")
    if memory_was_short:
        return OutOfMemory(f"{ended}: Linux killed it for lack of memory; {log}")
    return EngineError(f"{ended}, and Linux counted no out-of-memory kill in that time; {log}")
