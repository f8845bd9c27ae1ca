"""Run a sweep on a SLURM cluster: report failed jobs, and cancel all of them on Ctrl-C.

Hydra's submitit launcher submits the jobs. submitit comes with the extra ``slurm``, so code that
needs it is imported only once that launcher is chosen.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from kvpipe.errors import InputError

if TYPE_CHECKING:
    from kvpipe.sweeps.slurm_queue import QueueWatcher

_LOG_LINES = 10


class WatchQueue(Callback):
    """Hydra callback that makes submitit poll SLURM's queue (``conf/hydra/launcher/slurm.yaml``).

    The ``watcher`` is None if this process's jobs do not go to a cluster.
    """

    watcher: "ClassVar[QueueWatcher | None]" = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Install the poller before the first job is submitted."""
        from submitit.slurm.slurm import SlurmJob

        from kvpipe.sweeps.slurm_queue import QueueWatcher

        WatchQueue.watcher = SlurmJob.watcher = QueueWatcher()


def submitted() -> bool:
    """Whether SLURM has accepted jobs of this process."""
    return WatchQueue.watcher is not None and bool(WatchQueue.watcher.job_ids())


@contextmanager
def jobs(notify: Callable[[str], None]) -> Iterator[None]:
    """Report jobs that could not be submitted or left no result; cancel the jobs on Ctrl-C.

    A missing result or Ctrl-C is not an error here: all jobs have ended, and their records say how.

    Raises:
        InputError: SLURM accepted none.
    """
    WatchQueue.watcher = None
    try:
        yield
    except RuntimeError as error:
        if WatchQueue.watcher is None or not _is_submitits(error):
            raise
        message = _shortened(str(error))
        if not submitted():
            raise InputError(f"hydra/launcher: SLURM accepted no job: {message}") from None
        notify(f"kvpipe: a job left no result: {message}\n")
    except KeyboardInterrupt:
        if WatchQueue.watcher is None or not submitted():
            raise
        WatchQueue.watcher.cancel()


def _is_submitits(error: RuntimeError) -> bool:
    """Whether submitit raised the error; its own exceptions are all subclasses of RuntimeError."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("submitit.")


def _shortened(message: str) -> str:
    """Return submitit's message with only the last lines of the job's log that it contains."""
    lines = message.splitlines()
    return "\n  ".join([*lines[:2], *lines[2:][-_LOG_LINES:]])
