"""The files of the samples: whole when the phase's record is there, or an error that says so."""

import json
import os
from dataclasses import replace

import pytest
from pipeline_records import phase

from kvpipe.errors import RecordError
from kvpipe.sinks.rollouts import RolloutFiles, rollout_file

LINES = [json.dumps({"prompt": "a", "text": "Kühe\u2028"}, ensure_ascii=False), '{"prompt": "b"}']


def record_of(step):
    return replace(phase(9), phase=step)


def sampled(sink, step, lines=LINES):
    for line in lines:
        sink.sampled(step, line)


def test_each_sample_of_a_step_is_one_line_of_its_own_file(tmp_path):
    sink = RolloutFiles(tmp_path)
    for step in ("first", "it/../second#2"):
        sampled(sink, step)
        sink.phase_finished(record_of(step))
    files = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert files == ["first.jsonl", "it%2F..%2Fsecond#2.jsonl"]
    for name in files:
        assert (tmp_path / "rollouts" / name).read_text().split("\n") == [*LINES, ""]


def test_a_run_without_a_rollout_has_no_directory_for_them(tmp_path):
    RolloutFiles(tmp_path).phase_finished(record_of("jax_ready"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "rollouts").write_text("a file")
    sink = RolloutFiles(tmp_path)
    with pytest.raises(RecordError, match=r"first\.jsonl: cannot write a sample: "):
        sampled(sink, "first")


def test_a_full_disk_is_an_error_with_the_samples_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    sink = RolloutFiles(tmp_path)
    sampled(sink, "first")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"cannot write the samples: No space left on device"):
        sink.phase_finished(record_of("first"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "cannot write the samples: No such file or directory"),
        (lambda file: file.write_text("{}\n"), "has 1 sample, 2 were written: it was changed"),
    ],
)
def test_samples_that_are_removed_or_changed_during_the_run_are_noticed(tmp_path, change, message):
    sink = RolloutFiles(tmp_path)

    def changed(descriptor):
        change(rollout_file(tmp_path, "first"))

    sampled(sink, "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", changed)
        with pytest.raises(RecordError, match=message):
            sink.phase_finished(record_of("first"))
