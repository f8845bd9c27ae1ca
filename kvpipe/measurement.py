"""The probe's measurement after a phase."""

from dataclasses import dataclass

from kvpipe.ledger import Ledger
from kvpipe.records import Memory


@dataclass(frozen=True)
class Measurement:
    """Memory after a phase.

    Attributes:
        memory: for the record.
        ledger: bytes per device, by pool; None before jax runs.
    """

    memory: Memory
    ledger: Ledger | None
