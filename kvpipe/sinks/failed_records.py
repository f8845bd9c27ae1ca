"""Records on ranks after 0, which are needed only if the run fails."""

import os
from pathlib import Path
from typing import TextIO

from kvpipe.errors import RecordError
from kvpipe.records.run import RunFinished, RunStarted
from kvpipe.sinks import Collector
from kvpipe.sinks.jsonl import save_lines


class FailedRecords(Collector):
    """Print which host this is, and write the records of a failed run to a file.

    Rank 0 writes the records of every run. If that host is lost, these records remain. If the run
    passes, the file is not touched.
    """

    def __init__(self, path: Path, stream: TextIO) -> None:
        super().__init__()
        self._path = path
        self._stream = stream
        self._host = ""

    def run_started(self, record: RunStarted) -> None:
        """Print which host this is, and where the records are written."""
        engine = record.config["engine"]
        self._host = f"host {engine['node_rank']} of {engine['nnodes']}"
        self._say(f"{self._host}; host 0 writes the records")
        super().run_started(record)

    def run_finished(self, record: RunFinished) -> None:
        """Write the records of a failed run.

        Raises:
            RecordError: they cannot be written.
        """
        if not record.exit_code:
            return
        lines = [f"{kept.line}\n" for kept in (*self._records, record)]
        path = self._path
        try:
            if path.parent.is_dir():
                path.write_text("".join(lines))
            else:
                file, path = save_lines(path, [line.encode() for line in lines])
                os.close(file)
        except OSError as error:
            raise RecordError(
                f"{self._path}: cannot write the records: {error.strerror}"
            ) from error
        self._say(f"{self._host}: {record.error}; its records are in {path}")

    def _say(self, text: str) -> None:
        print(f"kvpipe: {text}", file=self._stream, flush=True)
