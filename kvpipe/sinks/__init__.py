"""Receivers of records, one file per sink; :class:`Sinks` passes each record to all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from kvpipe.errors import KvpipeError, RecordError, TimedOut, ending_of
from kvpipe.records.progress import Progress
from kvpipe.records.run import FAILED, PhaseRecord, Record, RunFinished, RunPlanned, RunStarted
from kvpipe.system import plugins
from kvpipe.system.alarm import limited


@dataclass
class Handed:
    """The records that the sinks were given before the last one.

    Attributes:
        records: the number of records.
        phases: the phase of each phase record, in order.
    """

    records: int = 0
    phases: list[str] = field(default_factory=list)


class Sink:
    """Base of every sink, with a hook for each event; a sink overrides those that it needs.

    The parent calls the hooks in this order; that of a record passes it on to :meth:`received`.
    Unless the sink is not ``limited``, that may be interrupted after ``runner.sink_timeout_s``. One that
    ``may_lag`` receives the plan and the record of a phase while the next phase runs; its error ends
    the run then.
    """

    limited: ClassVar[bool] = True
    may_lag: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name of the output, for messages."""
        return type(self).__name__

    def hung(self) -> None:
        """Give up the output, because a hook was interrupted; later hooks must not hang again."""

    def received(self, record: Record) -> None:
        """Receive a record of any kind."""

    def run_started(self, record: RunStarted) -> None:
        """Receive the first record, with the config of the run."""
        self.received(record)

    def run_planned(self, record: RunPlanned) -> None:
        """Receive the plan; it comes after the phases that run in the parent."""
        self.received(record)

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Receive the name of the step that starts, its position from 0 and the step count."""

    def phase_progressed(self, progress: Progress) -> None:
        """Receive the running phase's progress; without ``runner.isolate``, on another thread."""

    def sampled(self, step: str, line: str) -> None:
        """Receive a sample of the running phase's rollout, as a JSON line; its record comes later."""

    def phase_finished(self, record: PhaseRecord) -> None:
        """Receive the record of a phase."""
        self.received(record)

    def catch_up(self) -> None:
        """Receive, while a phase runs, the records that were not handed over yet."""

    def run_finishes(self, handed: Handed) -> None:
        """Receive the list of the records so far, before the last record.

        A sink that stores records raises a KvpipeError, now or with the last record, if it lacks one.
        """

    def run_finished(self, record: RunFinished) -> None:
        """Receive the last record and close; called once, also for a failed run."""
        self.received(record)


class Collector(Sink):
    """Base of the sinks that write only after the run has ended: it keeps the records until then.

    Args:
        earlier: records of the run before it was resumed.
    """

    def __init__(self, earlier: Sequence[Record] = ()) -> None:
        self._records: list[Record] = [*earlier]

    def received(self, record: Record) -> None:
        """Keep the record."""
        self._records.append(record)


class Sinks(Sink):
    """Composite of several sinks, each with the limit ``runner.sink_timeout_s`` for a record.

    Every sink receives every call, even if another sink fails; then the first error is raised, with
    the others as its notes. A sink that may fail at the end (W&B) must come first, so that the last
    record of the sinks after it includes that failure.
    """

    def __init__(self, sinks: Sequence[Sink], timeout_s: float | None = None) -> None:
        self._sinks = tuple(sinks)
        self._timeout_s = timeout_s
        self._handed = Handed()
        self._late: Callable[[Sink], None] | None = None
        self._late_errors: list[Exception] = []

    def run_started(self, record: RunStarted) -> None:
        """Pass the first record to every sink."""
        self._handed.records += 1
        self._call(lambda sink: self._hand(sink, lambda sink: sink.run_started(record)))

    def run_planned(self, record: RunPlanned) -> None:
        """Pass the plan to every sink, as :meth:`phase_finished` does with a record."""
        self._pass(lambda sink: sink.run_planned(record))

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Pass the step that starts to every sink."""
        self._call(lambda sink: sink.phase_started(step, idx, total))

    def phase_progressed(self, progress: Progress) -> None:
        """Pass the phase's progress to every sink."""
        self._call(lambda sink: sink.phase_progressed(progress))

    def sampled(self, step: str, line: str) -> None:
        """Pass a sample to every sink that has a use for it: a rollout has hundreds."""

        def hand(sink: Sink) -> None:
            if type(sink).sampled is not Sink.sampled:
                self._hand(sink, lambda sink: sink.sampled(step, line))

        self._call(hand)

    def phase_finished(self, record: PhaseRecord) -> None:
        """Pass the record of a phase to every sink; sinks that may lag get it by :meth:`catch_up`.

        Raise the errors of lagging sinks about the record before it.
        """
        self._handed.phases.append(record.phase)
        self._pass(lambda sink: sink.phase_finished(record))

    def _pass(self, receive: Callable[[Sink], None]) -> None:
        """Pass a record to every sink, later to those that may lag; raise their earlier errors."""
        self.catch_up()
        self._handed.records += 1
        self._late = None if self._late_errors else receive
        errors = self._taken_errors()
        self._call(lambda sink: sink.may_lag or self._hand(sink, receive), errors)

    def catch_up(self) -> None:
        """Pass the record before to the sinks that may lag; keep their errors."""
        receive, self._late = self._late, None
        if receive is None:
            return
        hand = partial(self._hand, receive=receive)
        for sink in (sink for sink in self._sinks if sink.may_lag):
            self._try(sink, hand, self._late_errors)

    def run_finished(self, record: RunFinished) -> None:
        """Pass the last record to every sink, marked as failed after a sink that failed."""
        self.catch_up()
        errors = self._taken_errors()
        for error in errors:
            record = failed_by(record, error)
        for sink in self._sinks:
            for end in (self._hand_all, self._hand_last):
                try:
                    end(sink, record)
                except (Exception, SystemExit) as caught:
                    errors.append(error := _error_of(sink, caught))
                    record = failed_by(record, error)
        _raise_all(errors)

    def _hand_all(self, sink: Sink, _: RunFinished) -> None:
        self._hand(sink, lambda sink: sink.run_finishes(self._handed))

    def _hand_last(self, sink: Sink, record: RunFinished) -> None:
        self._hand(sink, lambda sink: sink.run_finished(record))

    def _hand(self, sink: Sink, receive: Callable[[Sink], None]) -> None:
        """Hand a record to a sink, within the limit."""
        limit_s = self._timeout_s if sink.limited else None
        message = f"{sink.name} took longer than runner.sink_timeout_s = {limit_s} s for a record"
        try:
            with limited(limit_s, message):
                receive(sink)
        except TimedOut:
            sink.hung()
            raise

    def _taken_errors(self) -> list[Exception]:
        errors, self._late_errors = self._late_errors, []
        return errors

    def _call(self, call: Callable[[Sink], object], before: Sequence[Exception] = ()) -> None:
        errors = [*before]
        for sink in self._sinks:
            self._try(sink, call, errors)
        _raise_all(errors)

    def _try(self, sink: Sink, call: Callable[[Sink], object], errors: list[Exception]) -> None:
        try:
            call(sink)
        except (Exception, SystemExit) as error:
            errors.append(_error_of(sink, error))


def failed_by(record: RunFinished, error: Exception) -> RunFinished:
    """Return the last record, marked as failed by ``error`` unless the run had failed already."""
    ending = ending_of(error)
    if record.exit_code:
        return replace(record, error=f"{record.error}; then: {ending.error}")
    return replace(record, status=FAILED, exit_code=ending.exit_code, error=ending.error)


def _error_of(sink: Sink, error: Exception | SystemExit) -> Exception:
    """Return the error of a sink; an exception of a user's sink is not a defect of kvpipe."""
    module = type(sink).__module__
    if isinstance(error, Exception) and (
        isinstance(error, KvpipeError) or module.startswith("kvpipe.")
    ):
        return error
    where = plugins.place_of(error, plugins.roots(module))
    failed = RecordError(f"sink {sink.name}{where}: {plugins.reason_of(error)}")
    failed.__cause__ = error
    return failed


def _raise_all(errors: Sequence[Exception]) -> None:
    if not errors:
        return
    first, *others = errors
    for other in others:
        first.add_note(f"another sink failed too: {type(other).__name__}: {other}")
    raise first
