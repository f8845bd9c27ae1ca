"""A sweep on a SLURM cluster: what goes wrong with its jobs is told, and Ctrl-C ends them too.

Hydra's submitit launcher submits them. What needs submitit, which the extra ``slurm`` brings, is
imported only once that launcher is chosen.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from kvpipe.errors import InputError

if TYPE_CHECKING:
    from kvpipe.slurm_queue import QueueWatcher

_LOG_LINES = 10


class WatchQueue(Callback):
    """What has submitit ask SLURM's queue; ``conf/hydra/launcher/slurm.yaml`` names it.

    Attributes:
        watcher: what asks; None if the jobs of this process go to no cluster.
    """

    watcher: "ClassVar[QueueWatcher | None]" = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Do so before the first job is submitted."""
        from kvpipe.slurm_queue import watch_queue

        WatchQueue.watcher = watch_queue()


def submitted() -> bool:
    """Whether SLURM has taken jobs of this process."""
    return WatchQueue.watcher is not None and bool(WatchQueue.watcher.job_ids())


@contextmanager
def jobs(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell of jobs that cannot be submitted or left no result; cancel them on Ctrl-C.

    Neither of the latter is an error here: all jobs have ended by then, and their records say how.

    Args:
        tell: writes a message for the person at the terminal.

    Raises:
        InputError: SLURM took none.
    """
    WatchQueue.watcher = None
    try:
        yield
    except RuntimeError as error:
        if WatchQueue.watcher is None or not _is_submitits(error):
            raise
        message = _shortened(str(error))
        if not submitted():
            raise InputError(f"hydra/launcher: SLURM took no job: {message}") from None
        tell(f"kvpipe: a job left no result: {message}\n")
    except KeyboardInterrupt:
        if WatchQueue.watcher is None or not submitted():
            raise
        WatchQueue.watcher.cancel()


def _is_submitits(error: RuntimeError) -> bool:
    """Whether submitit raised an error; its own classes are all below RuntimeError."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("submitit.")


def _shortened(message: str) -> str:
    """Return submitit's message with no more than the end of the job's log, which it holds."""
    lines = message.splitlines()
    return "\n  ".join([*lines[:2], *lines[2:][-_LOG_LINES:]])
