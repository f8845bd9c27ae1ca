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
    """Write how long the phase has run, and its progress.

    Args:
        stream: output stream; never that of the records.
        every_s: seconds between lines, and from the start of a phase to its first line.
    """

    def __init__(self, stream: TextIO, every_s: float) -> None:
        self._stream = stream
        self._every_s = every_s
        self._beating: _Beating | None = None

    def phase_started(self, step: str, idx: int, total: int) -> None:
        """Start the lines of the step."""
        self._stop()
        self._beating = _Beating(self._stream, self._every_s, step, f"{idx + 1}/{total}")

    def phase_progressed(self, progress: Progress) -> None:
        """Keep the step's progress for the next line."""
        if self._beating and progress.step == self._beating.step:
            self._beating.latest = (time.monotonic(), progress)

    def phase_finished(self, record: PhaseRecord) -> None:
        """Stop the lines of the step."""
        self._stop()

    def run_finished(self, record: RunFinished) -> None:
        """Stop the lines of a step that has no record."""
        self._stop()

    def _stop(self) -> None:
        if self._beating:
            self._beating.thread.stop()
            self._beating = None


class _Beating:
    """The lines of one step."""

    def __init__(self, stream: TextIO, every_s: float, step: str, position: str) -> None:
        self.step = step
        self.latest: tuple[float, Progress] | None = None
        self.thread = PeriodicThread("heartbeat", self._beat, every_s)
        self._stream = stream
        self._every_s = every_s
        self._position = position
        self._began = time.monotonic()
        self.thread.start()

    def _beat(self) -> float:
        now = time.monotonic()
        line = f"kvpipe: {self._position} {self.step} has run for {now - self._began:.0f} s"
        if self.latest:
            at, progress = self.latest
            old = f", reported {now - at:.0f} s ago" if now - at > _OLD_S else ""
            line += f": {progress}{old}"
        self._stream.write(f"{line}\n")
        self._stream.flush()
        return self._every_s
