import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_records import STEPS, failed, passed, phase, pipeline, plan, started
from rich.console import Console

from kvpipe.records.progress import GENERATING, Progress
from kvpipe.sinks.console import ConsoleTable
from kvpipe.units import brief

OFFLINE = {
    "mode": "offline",
    "url": None,
    "dir": "/runs/1/wandb/offline-run-20260101_000000-abcdefgh",
    "fallback": False,
    "fallback_reason": None,
}


def shown(last, width=120, records=None, **console):
    out = io.StringIO()
    sink = ConsoleTable(Console(file=out, width=width, **console))
    sink.run_started(started())
    for record in pipeline() if records is None else records:
        sink.phase_started(record.phase, record.idx, 16)
        sink.phase_finished(record)
    sink.run_finished(last)
    return out.getvalue().splitlines()


def row_of(lines, name):
    return next(line.split() for line in lines if line.startswith(name))


def test_each_phase_has_a_row():
    lines = shown(passed())
    assert lines[0] == "kvpipe tiny (sizes in bytes; 1K is 1024)"
    assert [line.split()[0] for line in lines[1:18]] == ["phase", *STEPS]


def test_a_row_has_the_sizes_by_pool_each_in_its_unit():
    heading, *rows = shown(passed())[1:18]
    names = "phase seconds params kv slots other total planned peak RSS compiled checks"
    assert heading.split() == names.split()
    cells = "1.25 5.82G 9.00G 5.82G 154K 20.6G – 24.6G 3.00G 2 –"
    assert row_of(rows, "generate_result_after") == [STEPS[14], *cells.split()]
    assert row_of(rows, "kv_cache_dropped")[3] == "–"
    assert row_of(rows, "kv_cache_dropped")[-1] == "1/1"


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_table_fits_the_window_and_its_columns_line_up(width):
    table = shown(passed(), width)[1:18]
    assert {len(line) for line in table} == {len(table[0])}
    assert len(table[0]) <= width


def test_80_columns_are_enough_for_the_longest_name():
    lines = shown(passed(), 80)
    assert STEPS[14] in " ".join(lines)
    assert "RSS" not in lines[1]


def test_a_huge_size_does_not_break_the_columns():
    huge = phase(2, ledger={"params": 50 << 40, "kv": 123 << 30})
    line = row_of(shown(passed(), records=[huge]), "engine_ready_dummy")
    assert line[2:4] == ["50.0T", "123G"]


def test_the_planned_total_is_beside_the_measured_one_once_there_is_a_plan():
    out = io.StringIO()
    sink = ConsoleTable(Console(file=out, width=120))
    sink.run_started(started())
    sink.run_planned(plan())
    sink.phase_finished(phase(2))
    heading, verdict, row = out.getvalue().splitlines()[1:]
    planned = next(p.total_bytes for p in plan().phases if p.name == STEPS[2])
    at = heading.split().index("planned")
    assert row.split()[at - 1 : at + 1] == [brief(sum(phase(2).ledger.values())), brief(planned)]
    assert verdict.startswith("plan: fits v4:2x2x1 × 4, peak ")


def test_the_label_of_a_run_is_beside_its_experiment():
    out = io.StringIO()
    ConsoleTable(Console(file=out, width=120)).run_started(started({"label": "new mesh"}))
    assert out.getvalue().startswith("kvpipe tiny, new mesh (")


def test_the_end_names_the_page_and_after_a_failure_the_engines_log(tmp_path):
    for name in ("report.html", "engine.log"):
        (tmp_path / name).touch()
    page, log = f"page  {tmp_path}/report.html", f"log   {tmp_path}/engine.log"
    assert shown(passed(str(tmp_path)))[-2:] == [f"run   {tmp_path}", page]
    assert shown(failed(str(tmp_path)))[-3:] == [f"run   {tmp_path}", page, log]


def test_a_peak_that_is_not_known_is_said_below_its_row():
    unknown = replace(phase(5).peak, error="OSError: no such process")
    lines = shown(passed(), records=[phase(5, peak=unknown)])
    assert lines[3].strip() == "its peak is not known: OSError: no such process"


def test_a_run_that_passed_ends_with_its_verdict_and_its_places():
    online = {**OFFLINE, "mode": "online", "url": "https://wandb.ai/t/p/runs/1"}
    lines = shown(passed("/runs/1", fields={"wandb": online}))
    assert lines[18:] == [
        "",
        "passed (16 phases, 1/1 check, 41.2 s, exit code 0)",
        "run  /runs/1",
        "W&B  online https://wandb.ai/t/p/runs/1",
    ]


def test_a_run_that_failed_shows_the_failed_checks_and_why_it_is_offline():
    fallback = {**OFFLINE, "fallback": True, "fallback_reason": "no key [none]"}
    lines = shown(replace(failed("/runs/1"), fields={"wandb": fallback}), width=80)
    assert lines[19:] == [
        "failed (16 phases, 1/2 checks, 41.2 s, exit code 1)",
        "generate_result_after_kv_rebuild: the check 'same output' failed",
        "✗ same output",
        "  expected  [1, 2, 3]",
        "  actual    [1, 2, 4]",
        "  detail    first differing token at index 2",
        "run      /runs/1",
        f"W&B      offline {OFFLINE['dir']}",
        f"upload   wandb sync {OFFLINE['dir']}",
        "offline  because no key [none]",
    ]


def test_a_run_that_its_plan_skipped_is_not_called_failed():
    why = "the plan does not fit"
    lines = shown(passed(status="skipped", exit_code=2, error=why, checks=()), records=[])
    assert lines[-3].startswith("skipped (0 phases, 0/0 checks, 41.2 s, exit code 2)")
    assert lines[-2] == why
    assert "failed" not in "".join(lines)


def test_a_long_value_of_a_failed_check_is_cut():
    last = failed()
    check = replace(last.checks[1], expected=list(range(4096)))
    lines = shown(replace(last, checks=[check]))
    (line,) = (line for line in lines if line.startswith("  expected"))
    assert len(line) < 400
    assert line.endswith("characters, whole in records.jsonl)")


def test_a_run_that_ends_before_its_first_phase_still_has_a_verdict():
    out = io.StringIO()
    ConsoleTable(Console(file=out, width=80)).run_finished(failed())
    assert "failed (0 phases" in out.getvalue()


def test_a_terminal_sees_the_phase_that_runs_and_keeps_only_the_rows():
    lines = shown(passed(), force_terminal=True, color_system=None)
    assert any("3/16 engine_ready_dummy" in line for line in lines)
    # The last thing that is done to a live line is that it is erased.
    assert lines[-1].startswith("run")


@pytest.mark.parametrize(("width", "doing"), [(100, "generating 12/64 tokens, 3.2 s"), (60, "…")])
def test_the_live_line_says_how_far_the_phase_is_and_stays_one_line(width, doing):
    out = io.StringIO()
    sink = ConsoleTable(Console(file=out, width=width, force_terminal=True, color_system=None))
    sink.run_started(started())
    sink.phase_started(STEPS[14], 14, 16)
    for step in (STEPS[14], STEPS[13]):  # progress of a step that is over is too late
        sink.phase_progressed(progress_of(step))
    sink._live.refresh()
    sink._live.stop()
    live = [line for line in re.split(r"[\r\n]", plain(out.getvalue())) if STEPS[14] in line]
    assert live[-1].endswith(doing)
    assert len(live[-1]) <= width
    assert STEPS[13] not in plain(out.getvalue())[-width:]


def progress_of(step):
    elapsed_s = 3.21 if step == STEPS[14] else 99.0
    return Progress(step, GENERATING, elapsed_s, {"tokens": 12}, {"tokens": 64})


def plain(text):
    """Return what a terminal got without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_real_terminal_has_its_cursor_back_at_the_end():
    code = """
from pipeline_records import passed, phase, started
from kvpipe.sinks.console import ConsoleTable
from kvpipe.units import brief
sink = ConsoleTable()
sink.run_started(started())
sink.phase_started("jax_ready", 1, 16)
sink.phase_finished(phase(1))
sink.run_finished(passed())
"""
    reader, writer = pty.openpty()
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = {"PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "80", "LANG": "C.UTF-8"}
    subprocess.run([sys.executable, "-c", code], stdout=writer, env=environment, check=True)
    os.close(writer)
    seen = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "2/16 jax_ready" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
