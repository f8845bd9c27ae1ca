"""The lock file with which libtpu gives the TPU to one process at a time.

The lock ends with the process that holds it, but the file stays, and then no other user can open
it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LOCK_FILE = Path("/tmp/libtpu_lockfile")
_LOCKS = Path("/proc/locks")
_TPU = "tpu"


@dataclass(frozen=True)
class Holder:
    """The process that holds the lock: its id, the name of its user, its command line."""

    pid: int
    user: str
    command: str


def holder(lock_file: Path = LOCK_FILE) -> Holder | None:
    """Return the process that holds the lock; None if none does, or the file does not exist."""
    if not lock_file.exists():
        return None
    stat = lock_file.stat()
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    wanted = f"{device}:{stat.st_ino}"
    for line in _LOCKS.read_text().splitlines():
        # 1: POSIX  ADVISORY  WRITE 4711 fe:00:131 0 EOF; a waiting process has "->" after "1:".
        fields = line.split()
        if fields[1] != "->" and fields[5] == wanted:
            return _process(int(fields[4]))
    return None


def _process(pid: int) -> Holder:
    try:
        process = psutil.Process(pid)
        return Holder(pid, process.username(), " ".join(process.cmdline()))
    except psutil.Error:
        return Holder(pid, "unknown", "unknown")


@contextmanager
def libtpu_lock(device: str, lock_file: Path = LOCK_FILE) -> Iterator[None]:
    """Context of a run: on exit, remove the lock file if the run created it.

    Nothing is done unless ``device``, that of ``engine.device``, is the TPU.
    """
    ours = device == _TPU and not lock_file.exists()
    try:
        yield  # libtpu creates the file itself
    finally:
        if ours and lock_file.exists() and holder(lock_file) is None:
            lock_file.unlink()
