import subprocess
import sys

import pytest

from kvpipe.system.libtpu_lock import holder, libtpu_lock

# What libtpu does: it opens the file, locks it, and keeps it open.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock_file(tmp_path):
    return tmp_path / "libtpu_lockfile"


@pytest.fixture
def hold(lock_file):
    """Let a process hold the lock, and end it."""
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout.readline() == "held\n"
    yield held
    held.communicate()


def test_who_holds_the_lock_is_reported(lock_file, hold):
    found = holder(lock_file)
    assert found.pid == hold.pid
    assert str(lock_file) in found.command
    assert found.user


def test_a_file_that_nobody_has_locked_and_no_file_at_all_have_no_holder(lock_file):
    assert holder(lock_file) is None
    lock_file.touch()
    assert holder(lock_file) is None


def test_the_file_that_a_run_has_made_goes_with_it(lock_file):
    with libtpu_lock("tpu", lock_file):
        lock_file.touch()
    assert not lock_file.exists()


def test_a_file_that_was_there_before_stays(lock_file):
    lock_file.touch()
    with libtpu_lock("tpu", lock_file):
        pass
    assert lock_file.exists()


def test_a_file_that_another_process_holds_by_now_stays(lock_file, request):
    with libtpu_lock("tpu", lock_file):
        request.getfixturevalue("hold")
    assert lock_file.exists()


def test_a_run_on_the_cpu_touches_nothing(lock_file):
    with libtpu_lock("cpu", lock_file):
        lock_file.touch()
    assert lock_file.exists()
