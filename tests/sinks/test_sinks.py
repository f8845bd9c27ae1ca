import select

import pytest
from pipeline_records import failed, passed, phase, plan, started

from kvpipe.errors import KvpipeError, RecordError, TimedOut, TrackingError
from kvpipe.records.progress import GENERATING, Progress
from kvpipe.sinks import Sink, Sinks

PROGRESS = Progress("jax_ready", GENERATING, 1.0, {"tokens": 1}, {"tokens": 2})


class Recorder(Sink):
    def __init__(self, error=None):
        self.calls = []
        self.error = error

    def _take(self, *call):
        self.calls.append(call)
        if self.error:
            raise self.error

    def run_started(self, record):
        self._take("run_started", record)

    def run_planned(self, record):
        self._take("run_planned", record)

    def phase_started(self, step, idx, total):
        self._take("phase_started", step, idx, total)

    def phase_progressed(self, progress):
        self._take("phase_progressed", progress)

    def sampled(self, step, line):
        self._take("sampled", step, line)

    def phase_finished(self, record):
        self._take("phase_finished", record)

    def run_finished(self, record):
        self._take("run_finished", record)


def call_all(sinks):
    first, record, last = started(), phase(3), passed()
    sinks.run_started(first)
    sinks.run_planned(plan())
    sinks.phase_started("jax_ready", 3, 16)
    sinks.phase_progressed(PROGRESS)
    sinks.sampled("jax_ready", "{}")
    sinks.phase_finished(record)
    sinks.run_finished(last)
    return [
        ("run_started", first),
        ("run_planned", plan()),
        ("phase_started", "jax_ready", 3, 16),
        ("phase_progressed", PROGRESS),
        ("sampled", "jax_ready", "{}"),
        ("phase_finished", record),
        ("run_finished", last),
    ]


def test_every_sink_gets_every_call():
    recorders = [Recorder(), Recorder()]
    calls = call_all(Sinks(recorders))
    assert [recorder.calls for recorder in recorders] == [calls, calls]


@pytest.mark.parametrize(
    "call",
    [
        lambda sinks: sinks.run_started(started()),
        lambda sinks: sinks.run_planned(plan()),
        lambda sinks: sinks.phase_started("a", 0, 1),
        lambda sinks: sinks.phase_progressed(PROGRESS),
        lambda sinks: sinks.phase_finished(phase(0)),
        lambda sinks: sinks.run_finished(passed()),
    ],
)
def test_a_failing_sink_hinders_no_other_and_every_error_is_reported(call):
    errors = [TrackingError("W&B is gone"), KvpipeError("the disk is full")]
    last = Recorder()
    with pytest.raises(TrackingError, match="W&B is gone") as caught:
        call(Sinks([Recorder(errors[0]), Recorder(errors[1]), last]))
    assert caught.value.__notes__ == ["another sink failed too: KvpipeError: the disk is full"]
    assert len(last.calls) == 1


def test_the_last_record_says_that_an_earlier_sink_failed():
    last = Recorder()
    with pytest.raises(TrackingError):
        Sinks([Recorder(TrackingError("rows are lost")), last]).run_finished(passed())
    ((_, record),) = last.calls
    assert (record.status, record.exit_code, record.error) == ("failed", 3, "rows are lost")


def test_a_run_that_had_failed_keeps_its_exit_code_and_its_error():
    last, given = Recorder(), failed()
    with pytest.raises(TrackingError):
        Sinks([Recorder(TrackingError("rows are lost")), last]).run_finished(given)
    ((_, record),) = last.calls
    assert record.exit_code == given.exit_code
    assert record.error == f"{given.error}; then: rows are lost"


class Hangs(Recorder):
    """Waits long for each record, and is notified when it is abandoned."""

    def _take(self, *call):
        super()._take(*call)
        select.select([], [], [], 5)

    def hung(self):
        self.calls.append(("hung",))


def test_a_sink_that_hangs_is_given_up_and_the_others_get_the_record():
    hangs, other = Hangs(), Recorder()
    sinks = Sinks([hangs, other], 0.05)
    said = "Hangs took longer than runner.sink_timeout_s = 0.05 s for a record"
    with pytest.raises(TimedOut, match=said):
        sinks.phase_finished(phase(1))
    with pytest.raises(TimedOut, match=said):
        sinks.run_finished(passed())
    assert [call[0] for call in hangs.calls] == ["phase_finished", "hung", "run_finished", "hung"]
    first, last = (record for _, record in other.calls)
    assert first == phase(1)
    assert (last.status, last.exit_code, last.error) == ("failed", 5, said)


def test_before_the_last_record_each_sink_is_asked_for_all_that_was_handed_over():
    """Counted by who hands over, since a sink that forgets a record forgets to count it too."""
    asked = []

    class Forgets(Recorder):
        def run_finishes(self, handed):
            asked.append((handed.records, handed.phases))
            raise RecordError("a record is missing")

    last = Recorder()
    with pytest.raises(RecordError, match="a record is missing"):
        call_all(Sinks([Forgets(), last]))
    assert asked == [(3, [phase(3).phase])]
    _, record = last.calls[-1]
    assert (record.status, record.exit_code, record.error) == ("failed", 3, "a record is missing")


class Late(Recorder):
    may_lag = True


class LosesRows(Late):
    def phase_finished(self, record):
        super().phase_finished(record)
        raise TrackingError("the row is lost")


class LosesPlans(Late):
    def run_planned(self, record):
        super().run_planned(record)
        raise TrackingError("the plan is lost")


def test_a_plan_that_a_sink_that_lags_did_not_take_fails_with_the_record_of_the_first_step():
    late, prompt = LosesPlans(), Recorder()
    sinks = Sinks([late, prompt])
    sinks.run_planned(plan())
    with pytest.raises(TrackingError, match="the plan is lost"):
        sinks.phase_finished(phase(3))
    assert prompt.calls == [("run_planned", plan()), ("phase_finished", phase(3))]


def test_a_sink_that_may_lag_gets_each_record_while_the_next_step_runs_or_right_after_it():
    late, prompt = Late(), Recorder()
    sinks = Sinks([late, prompt])
    sinks.phase_finished(phase(3))
    assert (late.calls, prompt.calls) == ([], [("phase_finished", phase(3))])
    sinks.catch_up()
    assert late.calls == prompt.calls
    for idx in (4, 5):
        sinks.phase_finished(phase(idx))
    assert late.calls == prompt.calls[:-1]
    sinks.run_planned(plan())
    assert late.calls == prompt.calls[:-1]
    sinks.phase_finished(phase(6))
    assert late.calls == prompt.calls[:-1]
    sinks.run_finished(passed())
    assert late.calls == prompt.calls


@pytest.mark.parametrize("catches_up", [True, False])
def test_the_error_of_a_sink_that_lags_comes_with_the_next_record_whenever_it_got_its_own(
    catches_up,
):
    """Else it would depend on the time that the next step takes whether that one has a record."""
    late, prompt = LosesRows(), Recorder()
    sinks = Sinks([late, prompt])
    sinks.phase_finished(phase(3))
    if catches_up:
        sinks.catch_up()
    sinks.phase_started("jax_ready", 4, 16)
    with pytest.raises(TrackingError, match="the row is lost"):
        sinks.phase_finished(phase(4))
    assert prompt.calls[-1] == ("phase_finished", phase(4))
    assert [call for call in late.calls if call[0] == "phase_finished"] == prompt.calls[:1]


def test_the_last_record_says_what_a_sink_that_lags_has_not_taken():
    late, last = LosesRows(), Recorder()
    sinks = Sinks([late, last])
    sinks.phase_finished(phase(3))
    with pytest.raises(TrackingError, match="the row is lost"):
        sinks.run_finished(passed())
    _, record = last.calls[-1]
    assert (record.status, record.exit_code) == ("failed", 3)


def test_a_sink_with_limits_of_its_own_is_not_interrupted():
    class Slow(Recorder):
        limited = False

        def _take(self, *call):
            # Longer than the limit.
            select.select([], [], [], 0.1)
            super()._take(*call)

    slow = Slow()
    Sinks([slow], 0.01).phase_finished(phase(1))
    assert slow.calls == [("phase_finished", phase(1))]
