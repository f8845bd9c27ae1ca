"""Track a sweep's jobs through SLURM's queue.

submitit considers a job finished when its result exists or when SLURM's accounting says so. Without
accounting, which many clusters lack, it waits forever for a job that was killed, or cancelled
before it began. Every cluster has the queue. This module needs the extra ``slurm``.
"""

import logging
import subprocess
import time
from collections import Counter
from collections.abc import Sequence

from submitit.slurm.slurm import SlurmInfoWatcher

# submitit polls every few seconds at first, then less and less often, down to this.
_ASKED_EVERY_S = 60
_POLL_S = 1.0
_log = logging.getLogger(__name__)


class QueueWatcher(SlurmInfoWatcher):
    """Look jobs up in the queue; a job that is not in it has ended.

    All jobs are reported as ended together: the first one without a result ends submitit's wait for
    all others, so report it only when none of them waits or runs.
    """

    def __init__(self) -> None:
        super().__init__(delay_s=_ASKED_EVERY_S)
        self._summary = ""

    def _make_command(self) -> list[str]:
        # Do not query by id: squeue fails if it no longer knows one of them.
        return ["squeue", "--me", "--noheader", "--array", "--format=%i %T %r"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Return the state of each job from the queue's lines, and log changes."""
        text = string if isinstance(string, str) else string.decode()
        lines = (line.partition(" ") for line in text.splitlines())
        states = [state for job_id, _, state in lines if job_id in self._registered]
        self._report(states)
        state = "RUNNING" if states else "ENDED"
        return {job_id: {"State": state} for job_id in self._registered}

    def job_ids(self) -> list[str]:
        """Return SLURM's job ids; the jobs of an array have one in common."""
        return sorted({job_id.partition("_")[0] for job_id in self._registered})

    def cancel(self) -> None:
        """Cancel the jobs, of which there must be at least one, and wait until they have ended."""
        job_ids = self.job_ids()
        subprocess.run(["scancel", *job_ids], check=True)
        _log.info("SLURM job %s: cancelled", ", ".join(job_ids))
        while not self.is_done(job_ids[0], mode="force"):
            time.sleep(_POLL_S)

    def _report(self, states: Sequence[str]) -> None:
        counts = sorted(Counter(state.removesuffix(" None") for state in states).items())
        summary = ", ".join(f"{count} {state}" for state, count in counts) or "none left"
        if summary != self._summary:
            _log.info("SLURM job %s: %s", ", ".join(self.job_ids()), summary)
            self._summary = summary
