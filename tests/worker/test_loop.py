"""The loop of the worker, with steps that need no engine."""

import time
from itertools import pairwise
from types import SimpleNamespace

import pytest

from kvpipe.config.schema import Kvpipe, PlanConfig, RepeatConfig, RunnerConfig
from kvpipe.engine import peaks
from kvpipe.engine.compile_count import Compilations
from kvpipe.errors import BAD_INPUT, WRONG_WEIGHTS, InputError, KvpipeError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import SAVED, Cycle
from kvpipe.pipeline.ledger import Ledger
from kvpipe.pipeline.phase import OnFailure, Result, WorkerPhase
from kvpipe.records import progress
from kvpipe.records.progress import COMPILING, GENERATING, Progress
from kvpipe.records.run import Peak
from kvpipe.system.process_memory import process_memory
from kvpipe.worker import loop
from kvpipe.worker.drift import Drift
from kvpipe.worker.measurement import Measurement


class Waits(WorkerPhase):
    """Says that it generates, for ``seconds``."""

    seconds: float = 0.0

    def run(self, ctx):
        with progress.under_way(GENERATING, {"tokens": 4}, lambda: {"tokens": 1}):
            time.sleep(self.seconds)
        return Result()


class Samples(WorkerPhase):
    def run(self, ctx):
        return Result({"requests": 2}, samples=[{"text": "a"}, {"text": "b"}])


class Peaks(WorkerPhase):
    """Knows three moments of its own that may be its peak."""

    def run(self, ctx):
        for _ in range(3):
            peaks.mark()
        return Result()


class Fails(WorkerPhase):
    def run(self, ctx):
        raise KvpipeError("it cannot be done")


class Looks(Fails):
    on_failure = OnFailure.MAY_CONTINUE


class Cleans(Waits):
    on_failure = OnFailure.ALWAYS_RUN


class FailsToClean(Fails):
    on_failure = OnFailure.ALWAYS_RUN


class ReadsAnotherTree(WorkerPhase):
    def run(self, ctx):
        raise InputError("it has no leaf 'a'")


def run(*phases, **options):
    """Run the phases; return the records and the reported progress."""
    records, reported, ending = run_in(
        WorkerContext(Kvpipe(runner=RunnerConfig(**options)), "Hello"), phases
    )
    return records + ([ending.error] if ending.error else []), reported


def run_in(ctx, phases, planned=None, take=lambda record: None, started=lambda step, idx: None):
    """Run the phases; return the records, the reported progress, and the ending.

    ``take`` is called with each record, after it is in the list.
    """
    records, reported = [], []
    events = loop.Callbacks(
        joined=lambda hosts: None,
        planned=lambda plan: None,
        started=started,
        progressed=reported.append,
        sampled=lambda step, sample: records.append((step, sample)),
        finished=lambda record: (records.append(record), take(record)),
    )
    jobs = [
        loop.Job(idx, phase.step, phase, planned or Ledger(1)) for idx, phase in enumerate(phases)
    ]
    return records, reported, loop.run(jobs, ctx, events, time.monotonic())


@pytest.mark.parametrize(
    ("started", "exit_code", "error"),
    [
        (None, BAD_INPUT, "it has no leaf 'a'"),
        (
            SimpleNamespace(failure=SimpleNamespace(happened=False)),
            WRONG_WEIGHTS,
            "step 'reads': it has no leaf 'a'",
        ),
    ],
)
def test_input_that_is_wrong_once_the_engine_is_there_has_a_code_of_its_own(
    started, exit_code, error
):
    """It ended with 2, which says that the engine was not started."""
    ctx = WorkerContext(Kvpipe(runner=RunnerConfig(sample_peaks=False)), "Hello")
    ctx.started = started
    _, _, ending = run_in(ctx, [ReadsAnotherTree("reads")])
    assert (ending.exit_code, ending.error) == (exit_code, error)


def test_progress_is_reported_under_the_steps_name_and_at_most_five_times_a_second():
    _, reported = run(Waits("quick"), Waits("slow", 1.1))
    assert {p.step for p in reported[1:]} == {"slow"}
    slow = [progress.elapsed_s for progress in reported if progress.step == "slow"]
    assert len(slow) >= 2
    assert min(later - earlier for earlier, later in pairwise(slow)) > 0.2
    last = reported[-1]
    assert last == Progress("slow", GENERATING, last.elapsed_s, {"tokens": 1}, {"tokens": 4})


def test_a_compilation_is_shown_before_what_waits_for_it(monkeypatch):
    class Compiling:
        total = 2
        so_far = Compilations(count=2, seconds=1.5, loaded=3)
        compiling_s = 0.25

        def take(self):
            return self.so_far

    monkeypatch.setattr(loop, "CompileCounter", Compiling)
    (record,), reported = run(Waits("first", 0.4))
    assert Progress("first", COMPILING, 1.75, {"programs": 5}) in reported
    assert (record.compilations, record.programs_loaded, record.compile_s) == (2, 3, 1.5)


def test_the_time_between_two_steps_is_in_the_record_of_the_later_one():
    """Whoever receives the record of a step takes time that is no phase's."""
    received_s = 0.05
    ctx = WorkerContext(Kvpipe(), "Hello")
    phases = [Waits("a"), Fails("b"), Cleans("c")]
    records, *_ = run_in(ctx, phases, take=lambda record: time.sleep(received_s))
    first, *later = records
    assert first.outside_s == 0
    assert all(record.outside_s >= received_s for record in later)
    spent = sum(record.outside_s + record.duration_s for record in later)
    assert spent <= later[-1].elapsed_s - first.duration_s


@pytest.mark.parametrize(
    ("on_error", "phases", "ran"),
    [
        ("stop", [Looks("a"), Waits("b"), Cleans("c")], "ac"),
        ("continue", [Looks("a"), Waits("b"), Cleans("c")], "abc"),
        ("continue", [Looks("a"), Fails("b"), Waits("c"), Looks("d"), Cleans("e")], "abe"),
        ("stop", [FailsToClean("a"), Waits("b"), FailsToClean("c"), Cleans("d")], "acd"),
    ],
)
def test_after_a_failure_what_cleans_is_run_and_the_rest_as_the_config_says(on_error, phases, ran):
    (*records, error), _ = run(*phases, on_error=on_error)
    assert "".join(record.phase for record in records) == ran
    assert error == "it cannot be done"


MIB = 1 << 20


@pytest.mark.parametrize(
    ("planned", "measured", "passed", "detail"),
    [
        # A device that counts nothing itself: every array has an owner, so nothing may be off.
        ({}, {"other": 5}, True, "+0 bytes; this device counts no programs, so it must be exact"),
        ({"program": 9}, {}, True, "+0 bytes; this device counts no programs, so it must be exact"),
        # One that does: its programs are as planned, within the allowance, or as a plan lacks them.
        ({"program": 9}, {"program": 9 + 8 * MIB}, True, "+8388608 bytes; plan.allowance_bytes is"),
        ({"program": 9}, {"program": 10 + 8 * MIB}, False, "+8388609 bytes; plan.allowance_bytes"),
        ({}, {"program": 512 * MIB, "other": 5}, True, "+536870912 bytes; of programs, which the"),
        ({}, {"program": 512 * MIB + 1}, False, "536870912 are allowed"),
    ],
)
def test_the_total_may_differ_from_the_plan_by_what_a_device_counts_as_programs(
    monkeypatch, planned, measured, passed, detail
):
    def ledger(pools):
        return Ledger(1, {"kv": (3,)} | {pool: (size,) for pool, size in pools.items()})

    found = Measurement(process_memory(), ledger(measured), {"owner": measured.get("other", 0)})
    monkeypatch.setattr(loop.measurement, "measure", lambda ctx, **_: found)
    ctx = WorkerContext(Kvpipe(), "Hello")
    (record,), _, _ = run_in(ctx, [Waits("first")], ledger(planned))
    (check,) = (check for check in record.checks if check.name == "plan/total_bytes")
    assert (check.passed, detail in check.detail) == (passed, True), check.detail


@pytest.mark.parametrize(
    ("hosts", "held", "passed"), [(1, 20, True), (1, 21, False), (2, 40, True), (2, 41, False)]
)
def test_a_peak_may_have_what_jax_makes_an_array_from_and_what_hosts_gather_to_compare_it(
    hosts, held, passed
):
    ledger = Ledger(1, {"kv": (10,), "other": (5,)})
    peak = Peak((held,), held, 0, 1, "live_arrays", None)
    check = loop._peak_check(10, ledger, peak, PlanConfig(), hosts)
    assert (check.passed, check.actual) == (passed, held)


def test_once_the_plan_is_void_no_record_is_compared_with_it():
    (failed, cleaned, _), _ = run(Fails("a"), Cleans("b"))
    assert (failed.plan_error_bytes, cleaned.plan_error_bytes) == ({}, {})
    assert cleaned.passed


def test_every_record_has_a_peak_that_of_a_failed_phase_too():
    (first, failed, error), _ = run(Peaks("first"), Fails("second"))
    assert error == "it cannot be done"
    for record in (first, failed):
        assert record.peak.process_rss_bytes >= record.memory.process_rss_bytes
        assert record.peak.error is None
    assert first.peak.samples >= 3
    assert failed.peak.samples < 3, "samples of one phase were counted in the next"


def test_without_sampling_there_are_no_peaks():
    (record,), _ = run(Waits("first"), sample_peaks=False)
    assert record.peak is None


def test_the_samples_of_a_rollout_come_before_its_record_which_has_not_all_of_them():
    (first, second, record), _ = run(Samples("it"))
    assert [first, second] == [("it", {"text": "a"}), ("it", {"text": "b"})]
    assert (record.phase, record.fields) == ("it", {"requests": 2})


class Trains(WorkerPhase):
    def run(self, ctx):
        ctx.made_trainer.steps += 1
        return Result()


class Saves(WorkerPhase):
    def run(self, ctx):
        return Result({"steps": ctx.made_trainer.steps})


REPEAT = RepeatConfig("train", "roll_out", 3)
CYCLES = [
    *(
        Trains("train"),
        Waits("roll_out"),
        Waits("before#2"),
        Trains("train#2"),
        Waits("roll_out#2"),
    ),
    Saves("trainer_saved#2"),
]


@pytest.mark.parametrize(
    ("stop_at", "saved"),
    [
        ("train", None),
        ("roll_out", None),
        ("before#2", "trainer_saved"),
        ("train#2", "trainer_saved"),
        ("roll_out#2", None),
        ("end", None),
    ],
)
def test_a_worker_that_is_to_stop_saves_the_trainer_if_it_is_as_a_cycle_left_it(
    monkeypatch, stop_at, saved
):
    """In a cycle that has trained nothing is worth saving, and after a save nothing is left to."""

    def started(step, idx):
        if step == stop_at:
            raise loop.StopAsked

    ctx = WorkerContext(Kvpipe(repeat=REPEAT, runner=RunnerConfig(sample_peaks=False)), "Hello")
    ctx.made_trainer = SimpleNamespace(steps=0)
    monkeypatch.setattr(
        loop, "saving_step", lambda config, cycle: Saves(Cycle(cycle, {SAVED}).name(SAVED))
    )
    records, _, ending = run_in(ctx, [*CYCLES, Waits("end")], started=started)
    names = [phase.step for phase in [*CYCLES, Waits("end")]]
    before = names[: names.index(stop_at)]
    assert [record.phase for record in records] == [*before, *([saved] if saved else [])]
    assert (ending.exit_code, ending.error) == (0, None)


def test_a_cycle_of_a_resumed_run_is_not_held_against_one_that_compiled(monkeypatch):
    drift = Drift(skipped=4)
    sizes = {"weights_synced#4": 5, "drop#5": 1, "drop#6": 2, "drop#7": 2, "drop#8": 3}
    process = process_memory()
    results = [
        drift.compare(step, Measurement(process, Ledger(1, {"kv": (size,)})), 0)
        for step, size in sizes.items()
    ]
    assert [[check.passed for check in result.checks] for result in results] == [
        *([], [], []),
        [True],
        [False],
    ]
