"""The records on hosts after the first, whose own are not needed unless the run fails."""

from pathlib import Path
from typing import TextIO

from kvpipe.errors import RecordError
from kvpipe.progress import Progress
from kvpipe.records import PhaseRecord, Record, RunFinished, RunPlanned, RunStarted, dumps


class FailedRecords:
    """Says on a stream which host this is; writes the records of a run that failed.

    The first host writes those of every run. Where it is gone, these tell what happened.

    Args:
        path: the file for the records; it is written anew, or not at all.
        stream: for people.
    """

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path = path
        self._stream = stream
        self._records: list[Record] = []
        self._host = ""

    def run_started(self, record: RunStarted) -> None:
        """Say which host this is, and where the records are written."""
        engine = record.config["engine"]
        self._host = f"host {engine['node_rank']} of {engine['nnodes']}"
        self._say(f"{self._host}; host 0 writes the records")
        self._records.append(record)

    def run_planned(self, record: RunPlanned) -> None:
        """Keep the plan."""
        self._records.append(record)

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Do nothing: host 0 shows it."""

    def phase_progressed(self, progress: Progress) -> None:
        """Do nothing: host 0 shows it."""

    def phase_finished(self, record: PhaseRecord) -> None:
        """Keep the record."""
        self._records.append(record)

    def run_finished(self, record: RunFinished) -> None:
        """Write the records of a run that failed.

        Raises:
            RecordError: they cannot be written.
        """
        if not record.exit_code:
            return
        lines = [f"{dumps(kept)}\n" for kept in (*self._records, record)]
        try:
            self._path.write_text("".join(lines))
        except OSError as error:
            raise RecordError(
                f"{self._path}: cannot write the records: {error.strerror}"
            ) from error
        self._say(f"{self._host}: {record.error}; its records are in {self._path}")

    def _say(self, text: str) -> None:
        print(f"kvpipe: {text}", file=self._stream, flush=True)
