"""The records on hosts after the first, whose own are not needed unless the run fails."""

from pathlib import Path
from typing import TextIO

from kvpipe.errors import RecordError
from kvpipe.records import RunFinished, RunStarted, dumps
from kvpipe.sinks.collector import Collector


class FailedRecords(Collector):
    """Says on a stream which host this is; writes the records of a run that failed.

    The first host writes those of every run. Where it is gone, these tell what happened.

    Args:
        path: the file for the records; it is written anew, or not at all.
        stream: for people.
    """

    def __init__(self, path: Path, stream: TextIO) -> None:
        super().__init__()
        self._path = path
        self._stream = stream
        self._host = ""

    def run_started(self, record: RunStarted) -> None:
        """Say which host this is, and where the records are written."""
        engine = record.config["engine"]
        self._host = f"host {engine['node_rank']} of {engine['nnodes']}"
        self._say(f"{self._host}; host 0 writes the records")
        super().run_started(record)

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
