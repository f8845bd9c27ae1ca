import errno
import io
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from pipeline_records import OUTPUT, failed, passed, phase, pipeline, started

from kvpipe.errors import KvpipeError, RecordError, TimedOut
from kvpipe.records.progress import GENERATING, Progress
from kvpipe.sinks import Handed, Sinks
from kvpipe.sinks.jsonl import JsonFile, JsonLines


def write_run(sink):
    sink.run_started(started())
    for record in pipeline():
        sink.phase_started(record.phase, record.idx, 16)
        sink.phase_progressed(Progress(record.phase, GENERATING, 1.0))
        sink.phase_finished(record)
    sink.run_finished(passed())


def test_each_record_is_one_line_of_json(tmp_path):
    path = tmp_path / "records.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        write_run(JsonLines(stream))
    with path.open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    assert lines == [json.loads(record.line) for record in [started(), *pipeline(), passed()]]
    # This text has a line separator that is none in JSON lines.
    assert lines[9]["text"] == OUTPUT


def test_a_line_is_there_as_soon_as_its_phase_has_finished(tmp_path):
    path = tmp_path / "records.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        sink = JsonLines(stream)
        for count in (1, 2):
            sink.phase_finished(phase(count))
            assert path.read_bytes().count(b"\n") == count


def test_the_stream_is_left_open_for_who_opened_it():
    stream = io.StringIO()
    write_run(JsonLines(stream))
    assert not stream.closed


def test_a_reader_that_has_gone_away_is_an_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    with pytest.raises(KvpipeError, match="cannot write the record of 'jax_ready': Broken pipe"):
        JsonLines(stream).phase_finished(phase(1))
    with pytest.raises(BrokenPipeError):
        stream.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_an_error_that_names_the_file():
    # Closing tries to write what is left, and fails again.
    with (
        pytest.raises(OSError, match="No space left"),
        Path("/dev/full").open("w") as stream,
        pytest.raises(KvpipeError, match=r"/dev/full: cannot write .*: No space left on device"),
    ):
        JsonLines(stream).run_finished(passed())


def test_the_file_takes_the_same_lines(tmp_path):
    stream = io.StringIO()
    write_run(JsonLines(stream))
    with JsonFile(tmp_path / "records.jsonl") as sink:
        write_run(sink)
    assert (tmp_path / "records.jsonl").read_text() == stream.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_on_a_full_disk_the_file_keeps_whole_lines_and_has_room_for_the_end(tmp_path, monkeypatch):
    """The disk is full until the room that is kept for the end is given up."""
    path = tmp_path / "records.jsonl"
    write, close = os.write, os.close
    state = {"full": False, "reserve": None}

    def write_some(descriptor, line):
        if not state["full"]:
            return write(descriptor, line)
        state["torn"] = write(descriptor, line[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def give_back(descriptor):
        if descriptor == state["reserve"]:
            state["full"] = False
        close(descriptor)

    with JsonFile(path) as sink:
        state["reserve"] = sink._reserve
        assert os.fstat(sink._reserve).st_blocks * 512 >= 1 << 20
        sink.phase_finished(phase(1))
        monkeypatch.setattr(os, "write", write_some)
        monkeypatch.setattr(os, "close", give_back)
        state["full"] = True
        with pytest.raises(
            RecordError, match="cannot write the record of 'engine_ready_dummy': No"
        ):
            sink.phase_finished(phase(2))
        assert state["torn"] == 10
        sink.run_finished(passed())
        state["full"] = True
        with pytest.raises(RecordError, match="cannot write the record of 'run_finished'"):
            sink.run_finished(passed())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [phase(1), phase(2), passed()]
    assert lines == [json.loads(record.line) for record in expected]


def replace_file(path):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def replace_directory(path):
    shutil.copytree(path.parent, path.parent.with_name("copy"))
    shutil.rmtree(path.parent)
    path.parent.with_name("copy").rename(path.parent)


def append(path):
    with path.open("a") as file:
        file.write("{}\n")


HARM = {
    "removed": lambda path: path.unlink(),
    "replaced": replace_file,
    "emptied": lambda path: path.write_bytes(b""),
    "appended to": append,
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b"wandb", b"WANDB")),
    "directory removed": lambda path: shutil.rmtree(path.parent),
    "directory replaced": replace_directory,
    "directory and the one above removed": lambda path: shutil.rmtree(path.parent.parent),
}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("harm", HARM)
def test_records_that_are_lost_during_the_run_are_saved_and_that_is_an_error(
    tmp_path, monkeypatch, harm, at_the_end
):
    """A change that keeps the size is found at the end, when the whole file is read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "outputs/run/records.jsonl"
    path.parent.mkdir(parents=True)
    errors = []
    with JsonFile(path) as sink:
        for number, act in enumerate(
            (
                lambda: sink.phase_finished(phase(0)),
                lambda: at_the_end or sink.phase_finished(phase(1)),
                lambda: sink.run_finished(passed()),
            )
        ):
            try:
                act()
            except RecordError as error:
                errors.append(str(error))
            if number == 0:
                HARM[harm](path)
    (error,) = errors
    said = f"{path} was removed, replaced or changed during the run; the records are in "
    assert error.startswith(said)
    lines = Path(error.removeprefix(said)).read_text().splitlines()
    expected = [phase(0), *([] if at_the_end else [phase(1)])]
    assert lines[:-1] == [record.line for record in expected]
    end = json.loads(lines[-1])
    # What failed before is in the record of the run already, which the parent makes.
    noticed_last = at_the_end or harm == "changed"
    assert (end["exit_code"], end["error"]) == ((3, error) if noticed_last else (0, None))


@pytest.mark.parametrize("name", ["outputs/renamed/records.jsonl", "outputs/run/mine.jsonl"])
def test_records_that_are_moved_during_the_run_go_on_where_they_are(tmp_path, name):
    path = tmp_path / "outputs/run/records.jsonl"
    path.parent.mkdir(parents=True)
    with JsonFile(path) as sink:
        sink.phase_finished(phase(0))
        if "renamed" in name:
            path.parent.rename(tmp_path / "outputs/renamed")
        else:
            path.rename(tmp_path / name)
        with pytest.raises(RecordError) as caught:
            sink.phase_finished(phase(1))
        sink.run_finished(failed())
    assert str(caught.value) == (
        f"{path} was moved during the run; the records are in {tmp_path / name}"
    )
    lines = [record.line for record in (phase(0), phase(1), failed())]
    assert (tmp_path / name).read_text().splitlines() == lines


def test_a_file_without_a_line_for_each_record_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    with JsonFile(path) as sink:
        sink.phase_finished(phase(0))
        sink.run_finishes(Handed(1, ["wandb_init"]))
        with pytest.raises(RecordError, match=r"records\.jsonl has 1 of 2 records"):
            sink.run_finishes(Handed(2, ["wandb_init", "jax_ready"]))


def test_lost_records_that_can_be_saved_nowhere_are_an_error_too(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"

    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with JsonFile(path) as sink:
        sink.phase_finished(phase(0))
        path.unlink()
        monkeypatch.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(RecordError, match="its lines cannot be saved: Read-only file system"):
            sink.run_finished(passed())


def test_a_reader_that_does_not_read_is_given_up_after_the_limit():
    """The pipe is full, so that a write would wait for ever, and so would the end of the process."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(1 << 16))
    os.set_blocking(write_end, True)
    with os.fdopen(write_end, "w") as stream:
        sinks = Sinks([JsonLines(stream)], 0.05)
        with pytest.raises(TimedOut, match=r"took longer than runner.sink_timeout_s = 0.05 s for"):
            sinks.phase_finished(phase(1))
        sinks.run_finished(passed())
    os.close(read_end)


def test_a_resumed_run_adds_its_lines_to_those_that_are_whole(tmp_path):
    path = tmp_path / "records.jsonl"
    before = "".join(f"{record.line}\n" for record in (started(), phase(0), phase(1)))
    path.write_text(f"{before}{phase(2).line[:40]}")
    with JsonFile(path, continues=True) as sink:
        write_run(Sinks([sink]))
    again = "".join(f"{record.line}\n" for record in (started(), *pipeline(), passed()))
    assert path.read_text() == before + again
