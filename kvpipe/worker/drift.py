"""Drift of repeated steps: compare each with the same step of the cycle before.

From the third cycle on every byte must be where it was in the cycle before. The second cycle may
differ from the first, which compiles.
"""

from kvpipe.pipeline.cycles import base_name, cycle_of
from kvpipe.pipeline.ledger import Ledger
from kvpipe.pipeline.phase import Result
from kvpipe.records.run import check_equal
from kvpipe.worker.measurement import Measurement

_FIRST_SETTLED_CYCLE = 2


class Drift:
    """Compares each repeated step with the same step of the cycle before."""

    def __init__(self) -> None:
        self._settled_rss: dict[str, int] = {}
        self._before: dict[str, Ledger] = {}

    def compare(self, step: str, measured: Measurement) -> Result:
        """Return the drift since the cycle before, for a step of the third cycle or later."""
        if measured.ledger is None:
            return Result()
        base, cycle = base_name(step), cycle_of(step)
        rss = measured.memory.process_rss_bytes
        before = self._before.get(base)
        self._before[base] = measured.ledger
        if cycle < _FIRST_SETTLED_CYCLE or before is None:
            return Result()
        first_rss = self._settled_rss.setdefault(base, rss)
        fields = {"cycle": cycle, "rss_drift_bytes": rss - first_rss}
        if cycle == _FIRST_SETTLED_CYCLE:
            return Result(fields)
        drift = check_equal(
            "cycle_ledger", before.totals(), measured.ledger.totals(), "the cycle before"
        )
        return Result(fields, (drift,))
