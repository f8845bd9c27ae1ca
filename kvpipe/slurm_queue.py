"""The jobs of a sweep on a SLURM cluster, as the cluster's queue has them.

submitit takes a job for ended when its result is there or when SLURM's accounting says so. Without
accounting, as on many clusters, it waits without end for a job that was killed, or cancelled before
it began. The queue is there on every cluster. The module needs the extra ``slurm``.
"""

import logging
import subprocess
import time
from collections import Counter
from collections.abc import Sequence

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

# submitit asks after seconds at first, then less and less often, down to this.
_ASKED_EVERY_S = 60
_POLL_S = 1.0
_log = logging.getLogger(__name__)


class QueueWatcher(SlurmInfoWatcher):
    """Looks jobs up in the queue; a job that is not there any more has ended.

    All of them count as ended together: the first that left no result ends submitit's wait for
    every other one, so that may come only when none of them waits or runs.
    """

    def __init__(self) -> None:
        super().__init__(delay_s=_ASKED_EVERY_S)
        self._told = ""

    def _make_command(self) -> list[str]:
        # Not by their ids: squeue fails when it does not know one any more.
        return ["squeue", "--me", "--noheader", "--array", "--format=%i %T %r"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Return the state of each job from the lines of the queue, and tell what has changed."""
        text = string if isinstance(string, str) else string.decode()
        lines = (line.partition(" ") for line in text.splitlines())
        states = [state for job_id, _, state in lines if job_id in self._registered]
        self._tell(states)
        state = "RUNNING" if states else "ENDED"
        return {job_id: {"State": state} for job_id in self._registered}

    def job_ids(self) -> list[str]:
        """Return SLURM's ids of the jobs; those of an array have one together."""
        return sorted({job_id.partition("_")[0] for job_id in self._registered})

    def cancel(self) -> None:
        """Cancel the jobs, of which there is one at least, and wait for their end."""
        job_ids = self.job_ids()
        subprocess.run(["scancel", *job_ids], check=True)
        _log.info("SLURM job %s: cancelled", ", ".join(job_ids))
        while not self.is_done(job_ids[0], mode="force"):
            time.sleep(_POLL_S)

    def _tell(self, states: Sequence[str]) -> None:
        counts = sorted(Counter(state.removesuffix(" None") for state in states).items())
        told = ", ".join(f"{count} {state}" for state, count in counts) or "none left"
        if told != self._told:
            _log.info("SLURM job %s: %s", ", ".join(self.job_ids()), told)
            self._told = told


def watch_queue() -> QueueWatcher:
    """Let submitit look jobs up in the queue from now on; return what does."""
    watcher = QueueWatcher()
    SlurmJob.watcher = watcher
    return watcher
