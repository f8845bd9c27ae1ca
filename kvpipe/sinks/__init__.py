"""Where records go. One file a sink; :class:`Sinks` hands each record to all of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from kvpipe.progress import Progress
from kvpipe.records import PhaseRecord, RunFinished, RunPlanned, RunStarted


class Sink(Protocol):
    """What every sink understands. Calls come from the parent, in this order."""

    def run_started(self, record: RunStarted) -> None:
        """Take the first record: the config of the run that begins."""
        ...

    def run_planned(self, record: RunPlanned) -> None:
        """Take the plan; it comes after the phases that run before the engine's process."""
        ...

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Take the name of the step that begins, its position from 0 and the number of steps."""
        ...

    def phase_progressed(self, progress: Progress) -> None:
        """Take how far the phase is that runs; without ``runner.isolate`` from another thread."""
        ...

    def phase_finished(self, record: PhaseRecord) -> None:
        """Take the record of a phase."""
        ...

    def run_finished(self, record: RunFinished) -> None:
        """Take the last record and close; called once, also when the run failed."""
        ...


class Sinks:
    """Several sinks as one.

    Every sink gets every call, whatever happens in another; then the first error is raised, with
    the others as its notes. A sink that may still fail at the end (W&B) has to stand first: those
    after it then get a last record that says so.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def run_started(self, record: RunStarted) -> None:
        """Hand the first record to every sink."""
        self._call(lambda sink: sink.run_started(record))

    def run_planned(self, record: RunPlanned) -> None:
        """Hand the plan to every sink."""
        self._call(lambda sink: sink.run_planned(record))

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Hand the step that begins to every sink."""
        self._call(lambda sink: sink.phase_started(step, idx, total))

    def phase_progressed(self, progress: Progress) -> None:
        """Hand how far the phase is to every sink."""
        self._call(lambda sink: sink.phase_progressed(progress))

    def phase_finished(self, record: PhaseRecord) -> None:
        """Hand the record of a phase to every sink."""
        self._call(lambda sink: sink.phase_finished(record))

    def run_finished(self, record: RunFinished) -> None:
        """Hand the last record to every sink, marked as failed for those after one that failed."""
        errors: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.run_finished(record)
            except Exception as error:
                errors.append(error)
                record = failed_by(record, error)
        _raise_all(errors)

    def _call(self, call: Callable[[Sink], None]) -> None:
        errors: list[Exception] = []
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:
                errors.append(error)
        _raise_all(errors)


def failed_by(record: RunFinished, error: Exception) -> RunFinished:
    """Return the record of a run that ``error`` failed, if nothing had failed it before."""
    message = f"{record.error}; then: {error}" if record.error else str(error)
    exit_code = record.exit_code or getattr(error, "exit_code", 1)
    status = record.status if record.exit_code else "failed"
    return replace(record, status=status, exit_code=exit_code, error=message)


def _raise_all(errors: Sequence[Exception]) -> None:
    if not errors:
        return
    first, *others = errors
    for other in others:
        first.add_note(f"another sink failed too: {type(other).__name__}: {other}")
    raise first
