"""Periodic progress lines on stderr while a phase runs, for readers of a pipe or a log.

The lines come from the parent, so they continue while the worker is stuck.
"""

import time
from typing import TextIO

from kvpipe.records.progress import Progress
from kvpipe.records.run import PhaseRecord, RunFinished
from kvpipe.sinks import Sink
from kvpipe.system.periodic_thread import PeriodicThread

# The worker reports progress several times a second; mark an older report with its age.
_OLD_S = 5.0


class Heartbeat(Sink):
    """Write how long the phase has run, and its progress, every ``every_s`` seconds."""

    def __init__(self, stream: TextIO, every_s: float) -> None:
        self._stream = stream
        self._every_s = every_s
        self._thread: PeriodicThread | None = None
        self._step = ""
        self._position = ""
        self._began = 0.0
        self._latest: tuple[float, Progress] | None = None

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Start the lines of the step."""
        self._stop()
        self._step, self._position = step, f"{idx + 1}/{total}"
        self._began, self._latest = time.monotonic(), None
        self._thread = PeriodicThread("heartbeat", self._beat, self._every_s)
        self._thread.start()

    def phase_progressed(self, progress: Progress) -> None:
        """Keep the step's progress for the next line."""
        if progress.step == self._step:
            self._latest = (time.monotonic(), progress)

    def phase_finished(self, record: PhaseRecord) -> None:
        """Stop the lines of the step."""
        self._stop()

    def run_finished(self, record: RunFinished) -> None:
        """Stop the lines of a step that has no record."""
        self._stop()

    def _stop(self) -> None:
        if self._thread:
            self._thread.stop()
            self._thread = None

    def _beat(self) -> float:
        now = time.monotonic()
        line = f"kvpipe: {self._position} {self._step} has run for {now - self._began:.0f} s"
        if self._latest:
            at, progress = self._latest
            old = f", reported {now - at:.0f} s ago" if now - at > _OLD_S else ""
            line += f": {progress}{old}"
        self._stream.write(f"{line}\n")
        self._stream.flush()
        return self._every_s
