"""Records as JSON lines: the file ``records.jsonl``, and stdout for pipes and ``tee``."""

from typing import TextIO

from kvpipe.errors import KvpipeError
from kvpipe.progress import Progress
from kvpipe.records import (
    RUN_FINISHED,
    RUN_PLANNED,
    RUN_STARTED,
    PhaseRecord,
    Record,
    RunFinished,
    RunPlanned,
    RunStarted,
    dumps,
)


class JsonLines:
    """Writes one line a record, at once, so that a killed run leaves every line it had.

    The stream is closed by who opened it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def run_started(self, record: RunStarted) -> None:
        """Write the first record."""
        self._write(record, RUN_STARTED)

    def run_planned(self, record: RunPlanned) -> None:
        """Write the plan."""
        self._write(record, RUN_PLANNED)

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Do nothing: a line is written when the phase has finished."""

    def phase_progressed(self, progress: Progress) -> None:
        """Do nothing: progress is no record."""

    def phase_finished(self, record: PhaseRecord) -> None:
        """Write the record."""
        self._write(record, record.phase)

    def run_finished(self, record: RunFinished) -> None:
        """Write the last record."""
        self._write(record, RUN_FINISHED)

    def _write(self, record: Record, phase: str) -> None:
        line = dumps(record)
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (OSError, UnicodeEncodeError) as error:
            name = getattr(self._stream, "name", "the stream")
            reason = getattr(error, "strerror", None) or error
            raise KvpipeError(f"{name}: cannot write the record of {phase!r}: {reason}") from error
