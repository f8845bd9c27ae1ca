"""The samples of each rollout as JSON lines in ``rollouts/<step>.jsonl``."""

import os
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from kvpipe.errors import RecordError
from kvpipe.records.run import PhaseRecord
from kvpipe.sinks import Sink
from kvpipe.units import counted

ROLLOUTS_DIR = "rollouts"


def rollout_file(run_dir: Path, step: str) -> Path:
    """Return the file with the samples of a step; characters that no file name has are quoted."""
    return run_dir / ROLLOUTS_DIR / f"{quote(step, safe='#')}.jsonl"


class RolloutFiles(Sink):
    """Write each sample as one line; a step's file is whole once its record is there.

    Args:
        run_dir: directory of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: TextIO | None = None
        self._lines = 0

    @property
    def name(self) -> str:
        """Path of the directory."""
        return str(self._run_dir / ROLLOUTS_DIR)

    def sampled(self, step: str, line: str) -> None:
        """Write a sample.

        Raises:
            RecordError: it cannot be written.
        """
        path = rollout_file(self._run_dir, step)
        try:
            if self._file is None:
                path.parent.mkdir(exist_ok=True)
                self._file, self._lines = path.open("w", encoding="utf-8"), 0
            self._file.write(f"{line}\n")
            self._lines += 1
        except OSError as error:
            self._file = None
            raise RecordError(f"{path}: cannot write a sample: {error.strerror}") from error

    def phase_finished(self, record: PhaseRecord) -> None:
        """Close the step's file, and check that it has every sample.

        Raises:
            RecordError: it cannot be written, or was removed or changed.
        """
        file, self._file = self._file, None
        if file is None:
            return
        path = rollout_file(self._run_dir, record.phase)
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
            there = path.read_bytes().count(b"\n")
        except OSError as error:
            raise RecordError(f"{path}: cannot write the samples: {error.strerror}") from error
        if there != self._lines:
            raise RecordError(
                f"{path} has {counted(there, 'sample')}, {self._lines} were written: "
                "it was changed during the run"
            )
