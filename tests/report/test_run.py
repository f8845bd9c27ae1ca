import json
from dataclasses import replace

import pytest

from kvpipe.errors import InputError
from kvpipe.report.run import read_run
from kvpipe.sinks.wandb_tables import steps_taken
from tests.sinks.pipeline_records import STEPS, passed, phase, pipeline, started

LINES = [record.line for record in (started(), *pipeline(), passed())]


def write(folder, *lines, end="\n"):
    folder.mkdir(exist_ok=True)
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def test_a_directory_and_its_file_are_the_same_run(tmp_path):
    path = write(tmp_path / "r", *LINES)
    run = read_run(tmp_path / "r")
    assert read_run(path).phases == run.phases
    assert [r.line for r in (run.started, *run.phases, run.finished)] == LINES
    assert (run.status, run.experiment, [p.phase for p in run.phases]) == ("passed", "tiny", STEPS)


def test_of_a_killed_run_the_line_that_was_cut_off_is_left_out(tmp_path):
    write(tmp_path / "r", *LINES[:4], LINES[4][:30], end="")
    run = read_run(tmp_path / "r")
    assert (run.status, len(run.phases), run.finished) == ("unfinished", 3, None)


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    write(tmp_path / "r", *LINES, end="")
    assert read_run(tmp_path / "r").status == "passed"


def test_a_byte_order_mark_before_the_first_line_is_not_a_part_of_it(tmp_path):
    path = write(tmp_path / "r", *LINES)
    path.write_text(f"\ufeff{path.read_text()}")
    assert read_run(path).status == "passed"


def test_records_without_a_first_one_are_a_run_of_the_directorys_name(tmp_path):
    write(tmp_path / "r", *LINES[1:3])
    run = read_run(tmp_path / "r")
    assert (run.experiment, run.config, len(run.phases)) == ("r", {}, 2)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nosuch: there is no such directory or file"):
        read_run(tmp_path / "nosuch")
    with pytest.raises(InputError, match=r"there is no records\.jsonl in it, so it is not a run$"):
        read_run(tmp_path)
    write(tmp_path / "inner", *LINES)
    with pytest.raises(InputError, match="of its directories these are runs: inner"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", r"records\.jsonl, line 3: not JSON: Expecting value"),
        ("[1]", r"line 3: not a record: it has no 'phase'"),
        ('{"phase": 1}', r"line 3: not a record: it has no 'phase'"),
        ('{"phase": "a"}', r"line 3: not a record of this version of kvpipe: KeyError: 'memory'"),
        (phase(3).line.replace('"idx"', '"index"'), r"line 3: .*KeyError: 'idx'"),
    ],
)
def test_a_line_that_is_no_record_is_named_with_its_number(tmp_path, line, message):
    write(tmp_path / "r", *LINES[:2], line, *LINES[3:])
    with pytest.raises(InputError, match=message):
        read_run(tmp_path / "r")


def test_an_empty_file_and_one_that_is_not_text_are_refused(tmp_path):
    path = write(tmp_path / "r", end="")
    with pytest.raises(InputError, match="it has no records"):
        read_run(tmp_path / "r")
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8 at byte 7"):
        read_run(tmp_path / "r")


def test_a_line_separator_inside_a_text_does_not_split_a_line(tmp_path):
    line = json.dumps({**json.loads(LINES[1]), "text": "a\u2028b"}, ensure_ascii=False)
    write(tmp_path / "r", line)
    assert read_run(tmp_path / "r").phases[0].fields["text"] == "a\u2028b"


def test_a_resumed_run_is_one_run_without_the_work_that_was_lost(tmp_path):
    """The steps before the cycles, and those of a cycle that was abandoned, count as of the last part."""

    def part(*steps, skipped=(), status=None):
        names = [name for name, _ in steps]
        records = [replace(started(), steps=names, skipped=skipped)]
        records += [replace(phase(1), phase=name, idx=idx) for name, idx in steps]
        return [*records, *([replace(passed(), status=status)] if status else [])]

    first = part(("ready", 0), ("train", 1), ("saved", 2), ("train#2", 3), status="interrupted")
    killed = part(("ready", 0), skipped=["train", "saved"])
    last = part(
        *(("ready", 0), ("train#2", 3), ("saved#2", 4)), skipped=["train", "saved"], status="passed"
    )
    write(tmp_path / "r", *(record.line for record in [*first, *killed, *last]))
    run = read_run(tmp_path / "r")
    assert [p.phase for p in run.phases] == ["ready", "train", "saved", "train#2", "saved#2"]
    assert [p.line for p in run.phases] == [r.line for r in (last[1], *first[2:4], *last[2:4])]
    assert (run.status, run.started.line) == ("passed", last[0].line)
    # Rows up to that of step 3 and the tables, then of step 0 and tables, then of step 4 and tables.
    assert [steps_taken(part) for part in (first, [*first, *killed])] == [5, 7]
    assert steps_taken([*first, *killed, *last]) == 13
