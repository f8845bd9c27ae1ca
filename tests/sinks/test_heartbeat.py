import io
import time

import pytest
from pipeline_records import passed, phase, started

from kvpipe.records.progress import GENERATING, Progress
from kvpipe.sinks import heartbeat
from kvpipe.sinks.heartbeat import Heartbeat

PROGRESS = Progress("generate_result", GENERATING, 1.5, {"tokens": 3}, {"tokens": 64})
HEAD = "kvpipe: 9/16 generate_result has run for 0 s"


class Clock:
    """A clock that goes on only where a test says so."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def wait_for_lines(out, count):
    while out.getvalue().count("\n") < count:
        time.sleep(0.005)
    return out.getvalue().splitlines()[:count]


def test_while_a_phase_runs_a_line_comes_now_and_then_and_none_after_it():
    out = io.StringIO()
    sink = Heartbeat(out, 0.01)
    sink.run_started(started())
    sink.phase_started("generate_result", 8, 16)
    assert wait_for_lines(out, 2) == [HEAD] * 2
    sink.phase_finished(phase(8))
    written = out.getvalue()
    time.sleep(0.05)
    assert out.getvalue() == written


def test_a_line_says_how_far_the_phase_is_and_not_how_far_another_was():
    out = io.StringIO()
    sink = Heartbeat(out, 0.01)
    sink.phase_started("generate_result", 8, 16)
    sink.phase_progressed(PROGRESS)
    sink.phase_progressed(Progress("jax_ready", GENERATING, 9.9))
    lines = wait_for_lines(out, 2)
    sink.phase_finished(phase(8))
    assert lines[1] == f"{HEAD}: generating 3/64 tokens, 1.5 s"


def test_progress_of_long_ago_is_marked_as_old(clock):
    out = io.StringIO()
    sink = Heartbeat(out, 0.01)
    sink.phase_started("generate_result", 8, 16)
    sink.phase_progressed(PROGRESS)
    clock.now = 7.0
    *_, line = wait_for_lines(out, out.getvalue().count("\n") + 2)
    sink.run_finished(passed())
    head = HEAD.replace("0 s", "7 s")
    assert line == f"{head}: generating 3/64 tokens, 1.5 s, reported 7 s ago"


def test_a_phase_that_is_over_before_the_first_line_is_due_writes_nothing():
    out = io.StringIO()
    sink = Heartbeat(out, 60.0)
    for idx in range(3):
        sink.phase_started(f"step{idx}", idx, 3)
    sink.run_finished(passed())
    assert out.getvalue() == ""
