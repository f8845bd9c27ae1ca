"""Drift of repeated steps: compare each with the same step of the cycle before.

From the third cycle of a process on every byte must be where it was in the cycle before. The second
one may differ from the first, which compiles.
"""

from kvpipe.pipeline.cycles import base_name, cycle_of
from kvpipe.pipeline.ledger import PROGRAM, Ledger
from kvpipe.pipeline.phase import Result
from kvpipe.records.run import check_equal
from kvpipe.worker.measurement import Measurement

_FIRST_SETTLED_CYCLE = 2


class Drift:
    """Compares each repeated step with the same step of the cycle before.

    Args:
        skipped: number of cycles that ran in an earlier process.
    """

    def __init__(self, skipped: int = 0) -> None:
        self._skipped = skipped
        self._settled_rss: dict[str, int] = {}
        self._before: dict[str, tuple[Ledger, int]] = {}

    def compare(self, step: str, measured: Measurement, compilations: int) -> Result:
        """Return the drift since the cycle before, for a step of the third cycle or later.

        Args:
            step: its name.
            measured: the memory after it.
            compilations: programs that were compiled until then. A new program is not drift, so the
                pool ``program`` counts only if none was compiled since the cycle before.
        """
        if measured.ledger is None:
            return Result()
        base, cycle = base_name(step), cycle_of(step)
        here = cycle - self._skipped
        rss = measured.memory.process_rss_bytes
        before = self._before.get(base)
        self._before[base] = measured.ledger, compilations
        if here < _FIRST_SETTLED_CYCLE or before is None:
            return Result()
        first_rss = self._settled_rss.setdefault(base, rss)
        fields = {"cycle": cycle, "rss_drift_bytes": rss - first_rss}
        if here == _FIRST_SETTLED_CYCLE:
            return Result(fields)
        ledger, compiled = before
        was, now = ledger.totals(), measured.ledger.totals()
        if compilations > compiled:
            was.pop(PROGRAM, None)
            now.pop(PROGRAM, None)
        drift = check_equal("cycle_ledger", was, now, "the cycle before")
        return Result(fields, (drift,))
