import errno
import io
import json
import os
from pathlib import Path

import pytest
from pipeline_records import OUTPUT, passed, phase, pipeline, started

from kvpipe.errors import KvpipeError, RecordError
from kvpipe.records.progress import GENERATING, Progress
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
