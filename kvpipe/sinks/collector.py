"""Base of the sinks that write only after the run has ended."""

from kvpipe.records.run import Record
from kvpipe.sinks import Sink


class Collector(Sink):
    """Collects the records until the run has ended; a subclass overrides its end."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def received(self, record: Record) -> None:
        """Keep the record."""
        self._records.append(record)
