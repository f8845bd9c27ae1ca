"""A step that fails fails the run, in the worker's loop and in the parent."""

import io
import json
import time

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import Ending, PhaseError
from kvpipe.parent.supervisor import Run
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.ledger import Ledger
from kvpipe.pipeline.phase import ParentPhase, Result, WorkerPhase
from kvpipe.records.run import RunStarted, check_equal
from kvpipe.sinks.jsonl import JsonLines
from kvpipe.system.secrets import Redactor
from kvpipe.worker import loop
from tests.command import FAKE_KEY

REDACTOR = Redactor({FAKE_KEY: "A_KEY"})


class Compares(WorkerPhase):
    """Checks that a value is 8."""

    value: int = 8

    def run(self, ctx):
        return Result(checks=(check_equal("bytes", 8, self.value),))


class Breaks(ParentPhase):
    """Fails in the parent."""

    why: str = ""

    def run(self, ctx):
        raise PhaseError(self.why)


class Tracks(ParentPhase):
    """Starts the W&B run, and fails."""

    def run(self, ctx):
        ctx.start_tracking()
        raise PhaseError("it cannot be done")


def ending_by(*phases):
    ctx = WorkerContext(Kvpipe(), "Hello")
    events = loop.Callbacks(*[lambda *reported: None] * 6)
    jobs = [loop.Job(idx, phase.step, phase, Ledger(1)) for idx, phase in enumerate(phases)]
    return loop.run(jobs, ctx, events, time.monotonic())


def test_a_check_that_does_not_hold_fails_the_run_under_its_steps_name():
    assert ending_by(Compares("first"), Compares("second")) == Ending()
    ending = ending_by(Compares("first"), Compares("second", 9), Compares("third", 7))
    error = "step 'second': bytes: expected 8, it was 9"
    assert ending == Ending(1, error, "second", "CheckFailed")


def run_that_breaks(run_dir, step, redactor=None, tracked=None):
    """Run a pipeline whose only step fails in the parent; return its last record and all lines."""
    stream = io.StringIO()
    run = Run(
        config=Kvpipe(),
        plain={},
        started=RunStarted("test", {}, ("breaks",), {}, "2026-01-02T03:04:05+00:00"),
        steps=(step,),
        run_dir=run_dir,
        sinks=JsonLines(stream),
        start_tracking=lambda: tracked or {},
        redactor=redactor or Redactor(),
    )
    return run.carry_out(), stream.getvalue()


def test_a_step_of_the_parent_that_fails_has_its_own_record_and_ends_the_run(tmp_path):
    finished, lines = run_that_breaks(tmp_path, Breaks("breaks", "it cannot be done"))
    assert (finished.exit_code, finished.status) == (3, "failed")
    assert (finished.failing_phase, finished.error) == ("breaks", "it cannot be done")
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["phase"] for record in records] == ["run_started", "breaks", "run_finished"]
    (check,) = records[1]["checks"]
    assert (check["passed"], check["detail"]) == (False, "it cannot be done")


def test_a_record_of_the_parent_reaches_its_sinks_without_a_secret(tmp_path):
    breaks = Breaks("breaks", f"denied to {FAKE_KEY}")
    finished, lines = run_that_breaks(tmp_path, breaks, REDACTOR)
    assert finished.error == "denied to [redacted]"
    assert FAKE_KEY not in lines
    # The step's check, the run's copy of it, and the run's error.
    assert lines.count("denied to [redacted]") == 3


def test_what_wandb_answered_is_in_the_last_record_without_a_secret(tmp_path):
    """W&B's address may contain a password, and the reason of a fallback the address."""
    tracked = {"fallback_reason": f"no W&B at http://me:{FAKE_KEY}@host"}
    finished, lines = run_that_breaks(tmp_path, Tracks("tracks"), REDACTOR, tracked)
    assert finished.fields == {"wandb": {"fallback_reason": "no W&B at http://me:[redacted]@host"}}
    assert FAKE_KEY not in lines
