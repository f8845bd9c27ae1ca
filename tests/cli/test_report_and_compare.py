import subprocess
import sys
from pathlib import Path

import pytest

from tests.in_process import Answer, files

RUNS = Path(__file__).parents[1] / "data/tiny_runs"


SMALL, LARGE = str(RUNS / "1024.jsonl"), str(RUNS / "2048.jsonl")


def run_dir(path, records=SMALL):
    path.mkdir()
    (path / "records.jsonl").write_text(Path(records).read_text())
    return path


def test_report_writes_page_and_picture_beside_the_records(kvpipe, tmp_path):
    run_dir(tmp_path / "run")
    assert kvpipe("report", "run") == Answer(0, "run/report.html\nrun/timeline.png\n", "")
    assert files(tmp_path / "run") == ["records.jsonl", "report.html", "timeline.png"]


def test_report_writes_to_the_directory_that_is_given(kvpipe, tmp_path):
    (tmp_path / "here").mkdir()
    answer = kvpipe("report", SMALL, "report.dir=here")
    assert (answer.code, answer.out) == (0, "here/report.html\nhere/timeline.png\n")


def test_compare_holds_runs_against_the_first_and_its_exit_code_says_so(kvpipe, tmp_path):
    grown = kvpipe("compare", SMALL, LARGE)
    assert grown.code == 1
    assert grown.out.startswith("# Runs compared\n")
    assert grown.err == (
        f"kvpipe: {LARGE}: kv grew by 3,145,728 bytes after 'engine_ready_dummy' and in 10 more, "
        "compare.budget_bytes is 0\n"
    )
    assert kvpipe("compare", LARGE, SMALL).code == 0
    assert kvpipe("compare", SMALL, LARGE, "compare.budget_bytes=3145728").code == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize(("form", "begin"), [("json", "{"), ("html", "<!DOCTYPE html>")])
def test_compare_has_a_form_for_programs_and_one_for_browsers(kvpipe, tmp_path, form, begin):
    answer = kvpipe("compare", LARGE, SMALL, f"compare.format={form}", "compare.file=out")
    assert answer == Answer(0, "", "")
    assert (tmp_path / "out").read_text().startswith(begin)


def test_a_directory_with_an_equals_sign_in_its_name_is_a_run(kvpipe, tmp_path):
    run_dir(tmp_path / "tp=4")
    assert kvpipe("compare", "tp=4", SMALL).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "report: name one directory of a run or a sweep, not 0: report DIR"),
        (
            ["report", SMALL, LARGE],
            "report: name one directory of a run or a sweep, not 2: report DIR",
        ),
        (["report", "nosuch"], "nosuch: there is no such directory or file"),
        (["report", "."], ".: there is no records.jsonl in it, so it is not a run"),
        (["report", SMALL, "report.dir=nosuch"], "report.dir: there is no directory nosuch"),
        (
            ["report", SMALL, "report.dri=a"],
            "report.dri: there is no such key; did you mean 'dir'?",
        ),
        (
            ["compare", SMALL],
            "compare: name 2 to 26 run directories, not 1: compare RUN_A RUN_B",
        ),
        (
            ["compare", *[SMALL] * 27],
            "compare: name 2 to 26 run directories, not 27: compare RUN_A RUN_B",
        ),
        (["compare", SMALL, "nosuch"], "nosuch: there is no such directory or file"),
        (
            ["compare", SMALL, LARGE, "compare.format=xml"],
            "compare.format: Invalid value 'xml', expected one of [markdown, json, html]",
        ),
        (
            ["compare", SMALL, LARGE, "compare.budget_bytes=-1"],
            "compare.budget_bytes is -1, it must be at least 0",
        ),
        (
            ["compare", LARGE, SMALL, "compare.file=no/such"],
            "compare.file: cannot write no/such: No such file or directory",
        ),
    ],
)
def test_what_report_and_compare_cannot_read_is_reported_in_one_line(
    kvpipe, tmp_path, arguments, message
):
    assert kvpipe(*arguments) == Answer(2, "", f"kvpipe: {message}\n")
    assert files(tmp_path) == []


def test_a_report_that_cannot_be_written_is_reported_in_one_line(kvpipe, tmp_path):
    (run_dir(tmp_path / "run") / "report.html").mkdir()
    answer = kvpipe("report", "run")
    assert answer.code == 3
    assert answer.err == "kvpipe: run/report.html: cannot write the report: Is a directory\n"


def test_a_comparison_does_not_import_what_draws(tmp_path):
    code = (
        "import sys; from kvpipe.cli import app; code = app.main(sys.argv); "
        "sys.exit(code or any(m.split('.')[0] == 'PIL' for m in sys.modules))"
    )
    arguments = ["compare", LARGE, SMALL, "compare.format=html"]
    assert subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path).returncode == 0
