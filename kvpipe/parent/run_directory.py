"""Own the directory of a run: one run at a time, and never over the records of an earlier one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from kvpipe.config.hosts import own_file
from kvpipe.config.schema import EngineConfig
from kvpipe.errors import InputError
from kvpipe.records.run import ENGINE_LOG, RECORDS_FILE
from kvpipe.system.lock import LOCK_FILE, InUse, Lock, cannot_write, not_locked

RUN_DIR = "hydra.run.dir"
"""Config key of the directory."""


def set_aside(file: Path) -> None:
    """Rename a file that the next part of a resumed run would overwrite: ``engine.log`` to ``engine.1.log``."""
    if file.is_file():
        names = (file.with_suffix(f".{number}{file.suffix}") for number in count(1))
        file.rename(next(name for name in names if not name.exists()))


@contextmanager
def owned(
    run_dir: Path, engine: EngineConfig, overwrite: bool, notify: Callable[[str], None]
) -> Iterator[None]:
    """Hold the directory; several hosts of one run share it, each with files of its own.

    With ``overwrite`` it may have the records of an earlier run. ``notify`` writes a message for the
    person at the terminal.

    Raises:
        InUse: another run holds it, or an earlier run has left its records there.
        InputError: it cannot be written to.
    """
    lock = Lock(run_dir / own_file(LOCK_FILE, engine), RUN_DIR)
    try:
        locked = lock.acquire()
    except OSError as error:
        raise cannot_write(RUN_DIR, run_dir, error) from None
    if not locked:
        notify(f"{not_locked(run_dir, 'run')}\n")
    try:
        for name in (RECORDS_FILE, ENGINE_LOG):
            path = run_dir / own_file(name, engine)
            if path.exists() and not path.is_file():
                raise InputError(f"{RUN_DIR}: {path} is not a regular file; remove it")
            if path.exists() and not overwrite:
                raise InUse(
                    f"{RUN_DIR}: {path} belongs to an earlier run; choose another directory, or "
                    "set runner.overwrite=true to lose the records there"
                )
        yield
    finally:
        lock.release()
