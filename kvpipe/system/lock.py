"""A lock file for the life of a run, so that two runs cannot mix their files in one directory.

The kernel frees the lock when the process ends, however it ends.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from kvpipe.errors import InputError

LOCK_FILE = "run.lock"
# Errors of flock on a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MOST_BYTES = 1 << 12


class InUse(InputError):
    """Another process holds the lock, or the directory has the files of an earlier run."""


def cannot_write(key: str, directory: Path, error: OSError) -> InputError:
    """Return the error of a directory, chosen by a config key, in which nothing can be written."""
    return InputError(f"{key}: cannot write in {directory}: {error.strerror}")


def not_locked(directory: Path, what: str) -> str:
    """Return the warning of a run or a sweep whose directory cannot be locked."""
    return (
        f"kvpipe: {directory} is on a file system without file locks, so nothing keeps a second "
        f"{what} out of it"
    )


class Lock:
    """An exclusive lock; its file names the process that holds it, and is removed with it.

    Messages name the config key that chose the file's directory.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key
        self._file: int | None = None

    def acquire(self) -> bool:
        """Take the lock; return False, without it, on a file system that has no locks.

        Raises:
            InUse: another process holds it.
            OSError: the file cannot be created.
        """
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, _MOST_BYTES, 0).decode(errors="replace")
                os.close(file)
                raise InUse(self._in_use(holder)) from None
            except OSError as error:
                os.close(file)
                if error.errno not in _NO_LOCKS:
                    raise
                self._path.unlink(missing_ok=True)
                return False
            if is_at(file, self._path):
                break
            # The process that held it has removed the file since it was opened here.
            os.close(file)
        self._file = file
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
        return True

    def release(self) -> None:
        """Remove the file, wherever it is now, and free the lock."""
        if self._file is None:
            return
        # The directory may have been moved.
        place = place_of(self._file)
        if is_at(self._file, place):
            place.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def _in_use(self, holder: str) -> str:
        try:
            process = json.loads(holder)
            who = f"process {process['pid']} on {process['host']}, since {process['since']}"
        except (ValueError, KeyError):
            who = "a process that has not written its name yet"
        return (
            f"{self._key}: {self._path.parent} is in use by another run ({who}); choose another "
            "directory, or wait for its end"
        )


def place_of(file: int) -> Path:
    """Return the current path of a descriptor's file; of a removed file, one that is not there."""
    return Path(f"/proc/self/fd/{file}").readlink()


def is_at(file: int, path: Path) -> bool:
    """Whether the file of a descriptor is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False
