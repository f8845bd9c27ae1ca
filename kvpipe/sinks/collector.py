"""Base of the sinks that write only after the run has ended."""

from kvpipe.records.run import PhaseRecord, Record, RunPlanned, RunStarted
from kvpipe.sinks import Sink


class Collector(Sink):
    """Collects the records until the run has ended; a subclass then uses them."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def run_started(self, record: RunStarted) -> None:
        """Keep the first record."""
        self._records.append(record)

    def run_planned(self, record: RunPlanned) -> None:
        """Keep the plan."""
        self._records.append(record)

    def phase_finished(self, record: PhaseRecord) -> None:
        """Keep the record."""
        self._records.append(record)
