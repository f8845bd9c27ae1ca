"""The parent's side of a run: run its own phases, start the worker, feed the sinks, end it all.

It never imports jax. Whatever happens to the worker, the run ends with a ``run_finished`` record,
closed sinks and the right exit code.
"""

import importlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from kvpipe.child import Child, start_child
from kvpipe.context import ParentContext
from kvpipe.errors import UNEXPECTED_EXIT_CODE, EngineError, KvpipeError
from kvpipe.jax_environment import jax_environment
from kvpipe.phase import ParentPhase, Phase, Result
from kvpipe.process_memory import process_memory
from kvpipe.progress import Progress
from kvpipe.records import (
    Check,
    PhaseRecord,
    RunFinished,
    RunPlanned,
    RunStarted,
    phase_from_json,
    planned_from_json,
)
from kvpipe.schema import Kvpipe
from kvpipe.sinks import Sink
from kvpipe.steps import use_of

ENGINE_LOG = "engine.log"


class _Signal(BaseException):
    """A signal asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        exit_code: exit code of the process.
        error: why it failed, in one message; None if it passed.
    """

    exit_code: int = 0
    error: str | None = None


@dataclass
class Run:
    """A run under way.

    Attributes:
        config: the typed config.
        plain: the same as plain values, for the worker.
        started: the first record.
        steps: the steps, in order.
        run_dir: where the run writes.
        sinks: where its records go, the tracker's among them.
        start_tracking: begins the W&B run; returns what stands in the record of it.
        secrets: environment variables that the worker must not see.
    """

    config: Kvpipe
    plain: dict[str, Any]
    started: RunStarted
    steps: Sequence[Phase]
    run_dir: Path
    sinks: Sink
    start_tracking: Callable[[], dict[str, Any]]
    secrets: Sequence[str] = ()
    began: float = field(default_factory=time.time)
    checks: list[Check] = field(default_factory=list)
    _current: str = ""
    _tracking: dict[str, Any] | None = None

    def carry_out(self) -> RunFinished:
        """Carry the run out and return its last record, which every sink has got."""
        self.sinks.run_started(self.started)
        ending = self._end_of_phases()
        finished = RunFinished(
            status="failed" if ending.exit_code else "passed",
            exit_code=ending.exit_code,
            run_dir=str(self.run_dir),
            elapsed_s=round(time.time() - self.began, 6),
            checks=tuple(self.checks),
            error=ending.error,
            fields={"wandb": self._tracking} if self._tracking else {},
        )
        try:
            self.sinks.run_finished(finished)
        except KvpipeError:
            # The other sinks have been told; a run that failed before keeps its own exit code.
            if not finished.exit_code:
                raise
        return finished

    def _end_of_phases(self) -> Ending:
        try:
            with _signals_raise():
                self._run_parent_phases()
                if any(step.runs_in == "worker" for step in self.steps):
                    return self._run_worker()
            return Ending()
        except _Signal as caught:
            return Ending(
                128 + caught.signum, f"{signal.Signals(caught.signum).name} ended the run"
            )
        except KvpipeError as error:
            return Ending(error.exit_code, str(error))
        except Exception as error:
            # A defect of kvpipe: its traceback is for whoever mends it, the record for the user.
            traceback.print_exc()
            return Ending(UNEXPECTED_EXIT_CODE, f"{type(error).__name__}: {error}")

    def _run_parent_phases(self) -> None:
        for idx, step in enumerate(self.steps):
            if not isinstance(step, ParentPhase):
                continue
            self._on_started(step.step, idx)
            began = time.monotonic()
            try:
                result = step.run(ParentContext(self.config, self._start_tracking))
            except KvpipeError as error:
                check = Check(step.step, "completed", type(error).__name__, False, str(error))
                self._on_record(self._parent_record(step, idx, began, Result(checks=(check,))))
                raise
            self._on_record(self._parent_record(step, idx, began, result))

    def _start_tracking(self) -> dict[str, Any]:
        self._tracking = self.start_tracking()
        return self._tracking

    def _parent_record(self, step: Phase, idx: int, began: float, result: Result) -> PhaseRecord:
        return PhaseRecord(
            phase=step.step,
            use=use_of(step.step, self.config),
            idx=idx,
            elapsed_s=round(time.time() - self.began, 6),
            duration_s=round(time.monotonic() - began, 6),
            memory=process_memory(),
            checks=result.checks,
            fields=result.fields,
        )

    def _run_worker(self) -> Ending:
        return self._run_child() if self.config.runner.isolate else self._run_here()

    def _run_child(self) -> Ending:
        with self._start_worker() as child:
            child.send({"config": self.plain, "run_began": self.began})
            child.end_jobs()
            for message in child.messages():
                if "plan" in message:
                    self._on_plan(planned_from_json(message["plan"]))
                elif "record" in message:
                    self._on_record(phase_from_json(message["record"]))
                elif "started" in message:
                    self._on_started(message["started"], message["idx"])
                elif "progress" in message:
                    self.sinks.phase_progressed(Progress(**message["progress"]))
                else:
                    return Ending(message["exit_code"], message["error"])
            raise EngineError(
                f"the engine's process ended by {child.how_it_ended()} in step {self._current!r}; "
                f"its log {child.log} ends with:\n{child.log_tail()}"
            )

    def _start_worker(self) -> AbstractContextManager[Child]:
        inherited = {k: v for k, v in os.environ.items() if k not in self.secrets}
        return start_child(
            "kvpipe.worker",
            self.run_dir / ENGINE_LOG,
            inherited | jax_environment(self.config.engine, os.environ),
            self.config.runner.shutdown_timeout_s,
        )

    def _run_here(self) -> Ending:
        # A dynamic import: only here, for a debugger, does the parent load jax.
        os.environ.update(jax_environment(self.config.engine, os.environ))
        worker = importlib.import_module("kvpipe.worker")
        events = worker.runner.Events(
            self._on_plan, self._on_started, self.sinks.phase_progressed, self._on_record
        )
        outcome = worker.execute(self.config, events, self.began)
        return Ending(outcome.exit_code, outcome.error)

    def _on_plan(self, plan: RunPlanned) -> None:
        if hasattr(self.sinks, "run_planned"):
            self.sinks.run_planned(plan)

    def _on_started(self, step: str, idx: int) -> None:
        self._current = step
        self.sinks.phase_started(step, idx, len(self.steps))

    def _on_record(self, record: PhaseRecord) -> None:
        self.checks.extend(record.checks)
        self.sinks.phase_finished(record)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the run in order instead of ending the process."""

    def on_signal(signum: int, frame: FrameType | None) -> None:
        raise _Signal(signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.signal(signum, on_signal) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
