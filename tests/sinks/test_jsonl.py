import io
import json
import os
from pathlib import Path

import pytest
from pipeline_records import OUTPUT, passed, phase, pipeline, started

from kvpipe.errors import KvpipeError
from kvpipe.progress import GENERATING, Progress
from kvpipe.records import dumps
from kvpipe.sinks.jsonl import JsonLines


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
    assert lines == [json.loads(dumps(record)) for record in [started(), *pipeline(), passed()]]
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
