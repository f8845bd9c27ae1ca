import errno
import fcntl
import os
from contextlib import ExitStack

import pytest

from kvpipe.config.schema import EngineConfig
from kvpipe.parent.run_directory import owned
from tests.refusal import refusal

ALONE = EngineConfig(max_total_tokens=64)


def host(rank):
    return EngineConfig(max_total_tokens=64, nnodes=2, node_rank=rank)


def enter(run_dir, engine=ALONE, overwrite=False, notify=None):
    with owned(run_dir, engine, overwrite, notify or pytest.fail):
        return sorted(path.name for path in run_dir.iterdir())


def test_a_directory_belongs_to_one_run_until_its_end(tmp_path):
    with owned(tmp_path, ALONE, overwrite=True, notify=pytest.fail):
        message = refusal(enter, tmp_path, overwrite=True)
        assert message.startswith(f"hydra.run.dir: {tmp_path} is in use by another run (process ")
    assert enter(tmp_path) == ["run.lock"]
    assert list(tmp_path.iterdir()) == []


def test_the_hosts_of_one_run_share_a_directory(tmp_path):
    with ExitStack() as hosts:
        for rank in range(2):
            hosts.enter_context(owned(tmp_path, host(rank), False, pytest.fail))
        assert refusal(enter, tmp_path, host(1)).startswith("hydra.run.dir: ")
        (tmp_path / "records.jsonl").touch()
    assert enter(tmp_path, host(1)) == ["records.jsonl", "run.host1.lock"]


@pytest.mark.parametrize(
    ("engine", "left"),
    [(ALONE, "records.jsonl"), (ALONE, "engine.log"), (host(1), "engine.host1.log")],
)
def test_an_earlier_run_is_not_overwritten_unless_that_is_asked_for(tmp_path, engine, left):
    (tmp_path / left).write_text("of an earlier run")
    assert refusal(enter, tmp_path, engine) == (
        f"hydra.run.dir: {tmp_path / left} belongs to an earlier run; choose another directory, or "
        "set runner.overwrite=true to lose the records there"
    )
    assert len(enter(tmp_path, engine, overwrite=True)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_records_that_are_a_pipe_are_refused_and_not_written_to(tmp_path):
    os.mkfifo(tmp_path / "records.jsonl")
    assert refusal(enter, tmp_path, overwrite=True) == (
        f"hydra.run.dir: {tmp_path / 'records.jsonl'} is not a regular file; remove it"
    )


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path):
    assert refusal(enter, tmp_path / "none") == (
        f"hydra.run.dir: cannot write in {tmp_path / 'none'}: No such file or directory"
    )


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    reported = []
    assert enter(tmp_path, notify=reported.append) == []
    assert reported == [
        f"kvpipe: {tmp_path} is on a file system without file locks, so nothing keeps a second "
        "run out of it\n"
    ]
