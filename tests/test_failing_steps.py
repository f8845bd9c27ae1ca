"""A step that fails fails the run, in the worker's loop and in the parent."""

import io
import json
import time

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import PhaseError
from kvpipe.parent.supervisor import Run
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.ledger import Ledger
from kvpipe.pipeline.phase import ParentPhase, Result, WorkerPhase
from kvpipe.records.run import RunStarted, check_equal
from kvpipe.sinks.jsonl import JsonLines
from kvpipe.worker import loop


class Compares(WorkerPhase):
    """Checks that a value is 8."""

    value: int = 8

    def run(self, ctx):
        return Result(checks=(check_equal("bytes", 8, self.value),))


class Breaks(ParentPhase):
    """Fails in the parent."""

    def run(self, ctx):
        raise PhaseError("it cannot be done")


def failure_of(*phases):
    ctx = WorkerContext(Kvpipe(), "Hello")
    events = loop.Events(*[lambda *told: None] * 5)
    jobs = [loop.Job(idx, phase.step, phase, Ledger(1)) for idx, phase in enumerate(phases)]
    return loop.run(jobs, ctx, events, time.time())


def test_a_check_that_does_not_hold_fails_the_run_under_its_steps_name():
    assert failure_of(Compares("first"), Compares("second")) is None
    failure = failure_of(Compares("first"), Compares("second", 9), Compares("third", 7))
    assert failure.step == "second"
    assert str(failure.error) == "step 'second': bytes: expected 8, it was 9"
    assert failure.error.exit_code == 1


def test_a_step_of_the_parent_that_fails_has_its_own_record_and_ends_the_run(tmp_path):
    stream = io.StringIO()
    run = Run(
        config=Kvpipe(),
        plain={},
        started=RunStarted("test", {}, ("breaks",), {}, "2026-01-02T03:04:05+00:00"),
        steps=(Breaks("breaks"),),
        run_dir=tmp_path,
        sinks=JsonLines(stream),
        start_tracking=dict,
    )
    finished = run.carry_out()
    assert (finished.exit_code, finished.status) == (3, "failed")
    assert (finished.failing_phase, finished.error) == ("breaks", "it cannot be done")
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["phase"] for record in records] == ["run_started", "breaks", "run_finished"]
    (check,) = records[1]["checks"]
    assert (check["passed"], check["detail"]) == (False, "it cannot be done")
