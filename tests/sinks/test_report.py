import pytest
from pipeline_records import failed, passed, pipeline, started

from kvpipe.errors import KvpipeError
from kvpipe.sinks.report import PAGE_FILE, TIMELINE_FILE, ReportFile, write_page, write_timeline


def feed(sink, last):
    sink.run_started(started())
    for record in pipeline():
        sink.phase_started(record.phase, record.idx, 16)
        sink.phase_finished(record)
    sink.run_finished(last)


@pytest.mark.parametrize(
    ("last", "said"), [(passed(), "Passed"), (failed(), "Failed, exit code 1")]
)
def test_a_run_leaves_its_page_and_its_picture_however_it_ended(tmp_path, last, said):
    for write in (write_timeline, write_page):
        feed(ReportFile(tmp_path, write), last)
    assert (tmp_path / TIMELINE_FILE).read_bytes().startswith(b"\x89PNG")
    assert f">{said}</p>" in (tmp_path / PAGE_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize("write", [write_timeline, write_page])
def test_a_run_that_ended_before_its_first_phase_has_them_too(tmp_path, write):
    ReportFile(tmp_path, write).run_finished(failed())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", [write_timeline, write_page])
def test_a_report_that_cannot_be_written_is_an_error_that_names_it(tmp_path, write):
    with pytest.raises(KvpipeError, match=r"gone/\w+\.\w+: cannot write the report: No such file"):
        feed(ReportFile(tmp_path / "gone", write), passed())
