"""Write the step of each record into a file in the run's directory."""

from pathlib import Path
from typing import override

from kvpipe.records.run import PhaseRecord
from kvpipe.sinks import Sink


class AcmeSteps(Sink):
    """Append a line for each step that passed."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "acme_steps.txt"

    @override
    def phase_finished(self, record: PhaseRecord) -> None:
        with self._file.open("a") as file:
            file.write(f"{record.phase} {record.passed}\n")
