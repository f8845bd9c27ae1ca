"""The peak inside a phase: what it is made of, what a swap's is to the byte, and what it costs."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from kvpipe.checkpoints.safetensors import Tensors, open_checkpoint
from kvpipe.config.schema import ModelConfig
from kvpipe.engine import peaks
from kvpipe.engine.peaks import PeakSampler
from kvpipe.errors import Ending
from kvpipe.records.run import Memory, Peak, PhaseRecord
from kvpipe.system.periodic_thread import PeriodicThread
from tests.conftest import greedy
from tests.helpers_config import compose_plain, config_of


def memory(*used: int, own: tuple[int, ...] = (), rss: int = 10, peak_rss: int = 10) -> Memory:
    """Return a measurement; ``own`` are the devices' own peaks."""
    stats = [{"bytes_in_use": size} for size in used]
    for device, size in zip(stats, own, strict=False):
        device["peak_bytes_in_use"] = size
    return Memory(rss, peak_rss, stats, "device" if own else "live_arrays")


def peak_between(before: Memory | None, after: Memory) -> Peak:
    sampler = PeakSampler(lambda: False)
    sampler.begin(before)
    return sampler.take(after)


def test_the_two_ends_of_a_phase_belong_to_it() -> None:
    peak = peak_between(memory(5, 1), memory(2, 3))
    assert peak == Peak((5, 3), 6, 10, 0, "live_arrays")


def test_a_devices_own_peak_counts_only_where_it_rose_in_the_phase() -> None:
    before, after = memory(5, 5, own=(90, 8)), memory(4, 4, own=(90, 70))
    assert peak_between(before, after).bytes_in_use == (5, 70)
    assert peak_between(before, after).bytes_in_use_total == 70
    assert peak_between(None, after).bytes_in_use == (90, 70)


def test_the_systems_own_peak_of_rss_counts_only_if_it_rose_in_the_phase() -> None:
    for peak_rss, found in ((99, 12), (100, 100)):
        after = memory(rss=12, peak_rss=peak_rss)
        assert peak_between(memory(peak_rss=99), after).process_rss_bytes == found


def test_a_phase_after_which_the_measurement_fails_has_the_peak_that_was_seen_before() -> None:
    peak = peak_between(memory(5, 1), Memory(1, 1))
    assert (peak.bytes_in_use, peak.bytes_in_use_total, peak.source) == ((5, 1), 6, None)


def test_before_jax_only_rss_is_sampled() -> None:
    sampler = PeakSampler(lambda: False)
    sampler.sample()
    peak = sampler.take(Memory(1, 1))
    assert (peak.bytes_in_use, peak.bytes_in_use_total, peak.source) == ((), 0, None)
    assert (peak.samples, peak.process_rss_bytes > 1 << 20) == (1, True)


def test_a_sample_that_fails_is_reported_in_the_peak_and_raises_nowhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> bool:
        raise OSError("no such process")

    with PeakSampler(broken) as sampler:
        sampler.begin(None)
        peaks.mark()
        peak = sampler.take(memory(5))
    assert (peak.error, peak.samples) == ("OSError: no such process", 0)
    assert "no such process" in capsys.readouterr().err
    sampler.begin(None)
    assert sampler.take(memory(5)).error is None


def test_a_mark_is_a_sample_of_the_sampler_that_is_on() -> None:
    peaks.mark()
    with PeakSampler(lambda: False) as sampler:
        sampler._thread.stop()
        sampler.begin(None)
        peaks.mark()
        assert sampler.take(memory()).samples == 1
    peaks.mark()
    assert sampler.take(memory()).samples == 1


def test_the_thread_sleeps_the_longer_the_dearer_a_sample_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    for cost, sleep in ((0.0, 0.01), (0.003, 0.3), (0.5, 2.0)):
        sampler = PeakSampler(lambda: False)

        def spend(cost: float = cost) -> None:
            clock[0] += cost

        monkeypatch.setattr(sampler, "_take_one", spend)
        assert sampler._sample_once() == pytest.approx(sleep)
        assert sampler.spent_s == pytest.approx(cost)


STEPS = [
    "load",
    "param_dict",
    "swap",
    "release",
    "load_other",
    "stream",
    "flush",
    "kv_cache_offloaded",
    "kv_cache_restored",
    "generate",
]
OPTIONS: dict[str, dict[str, Any]] = {
    "load": {"use": "mllm_params_cpu_ready"},
    "param_dict": {"slot": "set"},
    "swap": {"use": "weights_swapped_from_mllm", "slot": "set", "probe_tokens": 0},
    "release": {"slots": ["set"], "host": ["mllm"]},
    "load_other": {"use": "mllm_params_cpu_ready"},
    "stream": {"use": "weights_streamed", "source": "mllm", "probe_tokens": 0},
    "flush": {"use": "flush_cache"},
    "generate": {"max_new_tokens": 24},
}


@pytest.fixture(scope="module")
def outcome(engine: Any, tiny_dir: Path) -> dict[str, Any]:
    """Records and progress of the two-set swap and the streamed one, one after the other.

    Without digests, whose multipliers lie on the devices for a moment that a sample may meet.
    """
    from kvpipe.engine import weights
    from kvpipe.pipeline.context import WorkerContext
    from kvpipe.pipeline.ledger import Ledger
    from kvpipe.pipeline.steps import build_steps, use_of
    from kvpipe.worker import loop

    plain = compose_plain() | {"pipeline": STEPS, "phases": OPTIONS}
    config = config_of(plain)
    config.plan.enforce = False
    config.model = ModelConfig(id="tiny", path=str(tiny_dir))
    config.sampling = greedy(24)
    engine.proves_weights = False
    engine.flush()
    weights.swap(engine, weights.build(engine, open_checkpoint(tiny_dir)))
    ctx = WorkerContext(config, "The KV cache", jax_ready=True, started=engine)
    jobs = [
        loop.Job(idx, use_of(step.step, config), step, Ledger(4))
        for idx, step in enumerate(build_steps(config))
    ]
    records: dict[str, PhaseRecord] = {}
    reported: list[Any] = []
    events = loop.Callbacks(
        joined=lambda hosts: None,
        planned=lambda plan: None,
        started=lambda step, idx: None,
        progressed=reported.append,
        sampled=lambda step, sample: None,
        finished=lambda record: records.__setitem__(record.phase, record),
    )
    assert loop.run(jobs, ctx, events, time.monotonic()) == Ending()
    engine.flush()
    engine.proves_weights = True
    return {"records": records, "progress": reported}


def test_the_way_over_a_second_set_peaks_at_two_sets_and_the_streamed_one_at_one(
    outcome: dict[str, Any],
) -> None:
    """Only records are compared, to the byte."""
    records: dict[str, PhaseRecord] = outcome["records"]
    before = records["load"].ledger
    one_set, rest = before["params"], before["kv"] + before["other"]
    for step in ("param_dict", "swap"):
        peak = records[step].peak
        assert peak is not None
        assert (peak.source, peak.error) == ("live_arrays", None)
        assert peak.bytes_in_use_total == 2 * one_set + rest
    assert sum(records["swap"].ledger.values()) == one_set + rest
    streamed = records["stream"].peak
    assert streamed is not None
    assert streamed.bytes_in_use_total == one_set + rest
    assert sum(streamed.bytes_in_use) == streamed.bytes_in_use_total
    assert streamed.samples >= 1  # the mark, whatever the thread managed


def test_an_offload_and_a_restore_of_the_kv_cache_peak_at_the_cache_and_its_blocks(
    outcome: dict[str, Any],
) -> None:
    records: dict[str, PhaseRecord] = outcome["records"]
    before = sum(records["flush"].ledger.values())
    for step in ("kv_cache_offloaded", "kv_cache_restored"):
        peak = records[step].peak
        assert peak is not None
        assert peak.bytes_in_use_total >= before
        assert peak.process_rss_bytes > 0


def test_the_progress_of_a_generate_counts_its_tokens(outcome: dict[str, Any]) -> None:
    reported = [
        p for p in outcome["progress"] if p.step == "generate" and p.activity == "generating"
    ]
    counts = [p.done["tokens"] for p in reported]
    assert counts
    assert counts[:-1] == sorted(counts[:-1])  # the last one may find the requests gone
    assert 0 < max(counts) <= 24
    assert {p.total["tokens"] for p in reported} == {24}
    assert all(
        earlier.elapsed_s < later.elapsed_s for earlier, later in itertools.pairwise(reported)
    )


def test_the_progress_of_a_placement_counts_its_leaves_and_bytes(
    real_engine: Any, tiny_weights: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine import transfer, weights
    from kvpipe.records import progress

    begin = transfer.begin
    for way in (weights.build, weights.stream):
        reported = []

        def watched(host: Any, like: Any, reported: list[Any] = reported) -> Any:
            activity = progress.now()
            assert activity is not None
            reported.append(activity.progress("it"))
            return begin(host, like)

        monkeypatch.setattr(transfer, "begin", watched)
        way(real_engine, tiny_weights)
        leaves = [p.done["leaves"] for p in reported]
        assert leaves == sorted(leaves)
        assert max(leaves) >= 36
        assert {p.total["leaves"] for p in reported} == {38}
        assert (
            reported[-1].done["bytes"]
            < reported[-1].total["bytes"]
            == weights.live_bytes(real_engine)
        )
    assert progress.now() is None


def test_samples_at_any_moment_do_not_change_what_a_phase_measures(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    """A list of the live arrays keeps them alive: a count at that moment would be too high."""
    from kvpipe.engine import memory, weights

    set_bytes = weights.live_bytes(real_engine)
    whole = sum(memory.bytes_in_use())
    highest = [0]

    def look() -> float:
        highest[0] = max(highest[0], sum(memory.used_now()))
        return 0.0

    with PeriodicThread("looks", look):
        for _ in range(5):
            change, kept = weights.offload(real_engine)
            assert -change.changed_bytes == set_bytes
            assert weights.restore(real_engine, kept).changed_bytes == set_bytes
            assert weights.stream(real_engine, tiny_weights).changed_bytes == 0
            assert sum(memory.bytes_in_use()) == whole
    largest = max(sum(memory.bytes_of([leaf])) for leaf in weights.parameters(real_engine).values())
    assert whole <= highest[0] <= whole + largest


def test_beside_a_generate_each_sample_is_followed_by_a_hundred_times_its_cost_without_one(
    real_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = PeakSampler._sample_once
    turns: list[tuple[float, float]] = []

    def noted(sampler: PeakSampler) -> float:
        before = sampler.spent_s
        wait = tick(sampler)
        turns.append((sampler.spent_s - before, wait))
        return wait

    monkeypatch.setattr(PeakSampler, "_sample_once", noted)
    with PeakSampler(lambda: True) as sampler:
        while len(turns) < 2:  # a sample that took long is followed by a long wait
            real_engine.generate("Hello", greedy(24))
        assert sampler.take(memory(0, 0, 0, 0)).samples >= len(turns)
    for spent, wait in turns:
        assert spent > 0
        assert wait == pytest.approx(min(max(100 * spent, 0.01), 2.0))
