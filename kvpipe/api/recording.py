"""Records of an attached engine's verbs, as a run writes them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvpipe.api.attached import Attached
from kvpipe.config.schema import EngineConfig
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import FAILED as FAILED_CODE
from kvpipe.errors import Ending, InputError, KvpipeError, ending_of
from kvpipe.pipeline.cycles import CYCLE_MARK
from kvpipe.pipeline.phase import WorkerPhase
from kvpipe.records.run import (
    FAILED,
    PASSED,
    RECORDS_FILE,
    Check,
    PhaseRecord,
    RunFinished,
    RunStarted,
)
from kvpipe.sinks import Sinks
from kvpipe.sinks.jsonl import JsonFile
from kvpipe.system.versions import installed_versions
from kvpipe.worker import loop


@contextmanager
def record(
    attached: Attached, run_dir: Path | str, *, experiment: str = "attached"
) -> Iterator[None]:
    """Record within the block each phase that a verb runs, with the memory after it.

    ``run_dir`` gets the ``records.jsonl`` of a run, which ``kvpipe report`` and ``kvpipe compare``
    read. A phase that runs again is called ``name#2`` and so on. There is no plan, so no bytes are
    compared with one.

    Args:
        attached: the engine.
        run_dir: directory of the run; it is made if it does not exist.
        experiment: name of the experiment in the records.

    Raises:
        InputError: the directory has the records of an earlier run, or the verbs are recorded already.
        RecordError: a record cannot be written.
    """
    file = Path(run_dir) / RECORDS_FILE
    if file.exists():
        raise InputError(f"record: {file} belongs to an earlier run; choose another directory")
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as threads, JsonFile(file) as lines:
        recorder = _Recorder(attached, Sinks([lines]), threads)
        recorder.begin(experiment)
        try:
            with attached._carried_out_by(recorder.carry_out):
                yield
        except BaseException as error:
            recorder.end(file.parent, _ending(error))
            raise
        recorder.end(file.parent, Ending())


class _Recorder:
    """The records of the verbs so far, and the state that the worker's loop keeps between them."""

    def __init__(self, attached: Attached, sinks: Sinks, threads: ExitStack) -> None:
        self._ctx = attached._ctx
        self._sinks = sinks
        self._began = time.monotonic()
        self._loop = loop.Loop(self._ctx, self._began, threads)
        self._records: list[PhaseRecord] = []

    def begin(self, experiment: str) -> None:
        """Write the first record."""
        self._sinks.run_started(
            RunStarted(
                experiment=experiment,
                config={"experiment": experiment, **_config(self._ctx.engine)},
                steps=(),
                versions=installed_versions(),
                started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    def carry_out(self, use: str, phase: WorkerPhase) -> Mapping[str, Any]:
        """Run a phase and write its record; return the fields that it reports.

        Raises:
            KvpipeError: it failed, or a check of it did not hold.
        """
        times = sum(record.use == use for record in self._records)
        step = f"{use}{CYCLE_MARK}{times + 1}" if times else use
        job = loop.Job(len(self._records), use, replace(phase, step=step), planned=None)
        callbacks = loop.Callbacks(
            joined=lambda hosts: None,
            planned=lambda plan: None,
            started=lambda step, idx: None,
            progressed=lambda progress: None,
            sampled=lambda step, sample: None,
            finished=self._write,
        )
        if (error := loop.carry_out(job, self._loop, callbacks)) is not None:
            raise error
        return self._records[-1].fields

    def end(self, run_dir: Path, ending: Ending) -> None:
        """Write the last record."""
        checks: list[Check] = [check for record in self._records for check in record.checks]
        failed = next((r.phase for r in self._records if not r.passed), None)
        self._sinks.run_finished(
            RunFinished(
                status=FAILED if ending.exit_code else PASSED,
                exit_code=ending.exit_code,
                run_dir=str(run_dir.absolute()),
                elapsed_s=round(time.monotonic() - self._began, 6),
                checks=checks,
                error=ending.error,
                failing_phase=failed if ending.exit_code else None,
                ledger=self._records[-1].ledger if self._records else {},
            )
        )

    def _write(self, record: PhaseRecord) -> None:
        self._records.append(record)
        self._sinks.phase_finished(record)


def _config(engine: SglangEngine) -> dict[str, Any]:
    """Return the engine's part of a run's config as plain values."""
    arguments = vars(engine.engine.server_args)
    known = {f.name: arguments[f.name] for f in fields(EngineConfig) if f.name in arguments}
    sizes = {"tp_size": engine.runner.tp_size, "max_total_tokens": engine.max_total_tokens}
    return {"engine": known | sizes, "model": {"id": arguments["model_path"]}}


def _ending(error: BaseException) -> Ending:
    """Return how a block ended that an exception left; one of the caller's is no defect of kvpipe."""
    if isinstance(error, KvpipeError):
        return ending_of(error)
    return Ending(FAILED_CODE, f"{type(error).__name__}: {error}", kind=type(error).__name__)
