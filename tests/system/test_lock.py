import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from kvpipe.system.lock import InUse, Lock

HOLD = """
import sys
from pathlib import Path
from kvpipe.system.lock import Lock
Lock(Path(sys.argv[1]), "a.key").acquire()
print(flush=True)
sys.stdin.read()
"""


def test_a_second_owner_is_refused_and_the_first_is_named_until_it_has_ended(tmp_path):
    path = tmp_path / "run.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        holder.stdout.readline()
        with pytest.raises(InUse) as caught:
            Lock(path, "a.key").acquire()
        holder.send_signal(signal.SIGKILL)
    assert f"a.key: {tmp_path} is in use by another run (process {holder.pid} on " in str(
        caught.value
    )
    assert f" on {socket.gethostname()}, since 20" in str(caught.value)
    lock = Lock(path, "a.key")
    assert lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_owner_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Two processes would each have a lock, on two files of one name."""
    path = tmp_path / "run.lock"
    flock, removed = fcntl.flock, []

    def remove_once(file, operation):
        flock(file, operation)
        if not removed:
            removed.append(os.fstat(file).st_ino)
            path.unlink()
            path.touch()

    monkeypatch.setattr(fcntl, "flock", remove_once)
    lock = Lock(path, "a.key")
    assert lock.acquire()
    assert path.read_text().startswith(f'{{"pid": {os.getpid()}, ')
    with pytest.raises(InUse):
        Lock(path, "a.key").acquire()
    lock.release()


def test_where_the_file_system_has_no_locks_that_is_said_and_nothing_left(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = Lock(tmp_path / "run.lock", "a.key")
    assert not lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_the_file_goes_even_if_its_directory_was_moved(tmp_path):
    (tmp_path / "a").mkdir()
    lock = Lock(tmp_path / "a/run.lock", "a.key")
    lock.acquire()
    (tmp_path / "a").rename(tmp_path / "b")
    lock.release()
    assert list((tmp_path / "b").iterdir()) == []
