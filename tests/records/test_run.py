import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvpipe.records.metrics import metrics
from kvpipe.records.run import (
    RUN_FINISHED,
    RUN_STARTED,
    SUMMARY_FIELDS,
    Check,
    Fit,
    Memory,
    Peak,
    PhaseRecord,
    PlannedPhase,
    Program,
    RunFinished,
    RunPlanned,
    RunStarted,
    check_equal,
    record_from_json,
)
from kvpipe.records.sweep import SweepFinished, SweepJob

RUNS = sorted((Path(__file__).parents[1] / "data/tiny_runs").glob("*.jsonl"))
KNOWN_KEYS = set(PhaseRecord("a", "a", 0, 0.0, 0.0, Memory(1, 1)).to_json())

names = st.text(min_size=1)
sizes = st.integers(min_value=0, max_value=1 << 50)
times = st.floats(min_value=0, max_value=1e9)
pools = st.dictionaries(names, sizes, max_size=4)
scalars = (
    st.none() | st.booleans() | sizes | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
checks = st.builds(Check, names, json_values, json_values, st.booleans(), st.text())
several_names = st.lists(names, max_size=3).map(tuple)
several_checks = st.lists(checks, max_size=3).map(tuple)
memories = st.builds(
    Memory,
    sizes,
    sizes,
    st.lists(st.dictionaries(st.sampled_from(SUMMARY_FIELDS) | names, sizes), max_size=4).map(
        tuple
    ),
    st.sampled_from(["device", "live_arrays", None]),
)
peaks = st.builds(
    Peak,
    st.lists(sizes, max_size=4).map(tuple),
    sizes,
    sizes,
    sizes,
    st.sampled_from(["device", "live_arrays", None]),
    st.none() | st.text(),
)
phase_records = st.builds(
    PhaseRecord,
    phase=names,
    use=names,
    idx=st.integers(0, 99),
    elapsed_s=times,
    duration_s=times,
    memory=memories,
    peak=st.none() | peaks,
    ledger=pools,
    plan_error_bytes=pools,
    compilations=st.integers(0, 99),
    compile_s=times,
    programs_loaded=st.integers(0, 99),
    outside_s=times,
    checks=several_checks,
    fields=st.dictionaries(names.filter(lambda n: n not in KNOWN_KEYS), json_values, max_size=4),
)


planned_phases = st.builds(PlannedPhase, names, pools, sizes, sizes)
run_records = st.one_of(
    st.builds(
        RunStarted,
        st.text(),
        st.dictionaries(st.text(), json_values, max_size=4),
        several_names,
        st.dictionaries(names, st.text(), max_size=4),
        st.text(),
    ),
    st.builds(
        RunPlanned,
        names,
        sizes,
        names,
        st.lists(planned_phases, max_size=3).map(tuple),
        st.builds(Fit, st.booleans(), sizes, names, sizes, sizes),
        st.lists(st.builds(Program, names, sizes, sizes, sizes, sizes, times), max_size=3).map(
            tuple
        ),
        times,
    ),
    st.builds(
        RunFinished,
        names,
        sizes,
        st.text(),
        times,
        several_checks,
        st.none() | st.text(),
        st.none() | names,
        pools,
        st.none() | planned_phases,
        st.text(),
        st.dictionaries(st.just("wandb") | st.just("fields"), json_values),
    ),
    st.builds(
        SweepFinished,
        names,
        names,
        sizes,
        st.text(),
        several_names,
        st.lists(
            st.builds(
                SweepJob,
                sizes,
                st.dictionaries(names, st.text(), max_size=2),
                several_names,
                names,
                st.text(),
                st.text(),
                exit_code=st.none() | sizes,
                fits=st.none() | st.booleans(),
                rebuild_s=st.none() | times,
            ),
            max_size=2,
        ).map(tuple),
    ),
)


def a_record(**more):
    base = {"phase": "p", "use": "u", "idx": 3, "elapsed_s": 2.0, "duration_s": 0.5}
    return PhaseRecord(**base, memory=more.pop("memory", Memory(10, 20)), **more)


@given(phase_records | run_records)
def test_a_record_that_was_written_reads_back_the_same(record):
    line = record.line
    assert "\n" not in line
    again = type(record).from_json(json.loads(line))
    assert again == record
    assert again.line == line


def has_all_of(new, old):
    """Whether ``new`` has every key of ``old``, in the same order and with the same value."""
    if isinstance(old, dict):
        same_order = [key for key in new if key in old] == list(old)
        return same_order and all(has_all_of(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(has_all_of, new, old))
    return json.dumps(new) == json.dumps(old)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_from_before_there_were_peaks_is_written_again_with_all_that_it_has(path):
    for line in path.read_text().splitlines():
        old = json.loads(line)
        assert has_all_of(json.loads(record_from_json(old).line), old)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"fit": None}, "Fit must be an object, not None"),
        ({"phases": 5}, "'int' object is not iterable"),
        ({"sizes": 1}, "unexpected keyword argument 'sizes'"),
        ({"fit": {"fits": True}}, "missing 3 required"),
    ],
)
def test_an_object_that_is_no_plan_is_refused(change, error):
    plan = RunPlanned("cpu", 1, "0.0.2", (), Fit(True, 9, "p", 4)).to_json()
    with pytest.raises(TypeError, match=error):
        RunPlanned.from_json(plan | change)


@given(phase_records)
@example(a_record(fields={"drop_info": True}))
def test_metrics_are_numbers_or_names_and_leave_texts_out(record):
    values = metrics(record)
    assert values["phase/name"] == record.phase
    assert "text" not in values
    assert not [v for v in values.values() if isinstance(v, float) and math.isnan(v)]


def test_the_json_of_a_phase_has_the_scripts_names():
    stats = [{"bytes_in_use": 5, "bytes_limit": 9}, {"bytes_in_use": 7, "bytes_limit": 9}]
    record = a_record(
        memory=Memory(10, 20, stats, "device"),
        peak=Peak((6, 8), 13, 21, 3, "device"),
        ledger={"kv": 12},
        plan_error_bytes={"kv": 0},
        compilations=2,
        checks=[check_equal("freed", 1, 2, "why")],
        fields={"drop_info": {"deleted_buffers": 3}},
    )
    assert record.to_json() == {
        "phase": "p",
        "use": "u",
        "idx": 3,
        "elapsed_s": 2.0,
        "duration_s": 0.5,
        "memory": {
            "process_rss_bytes": 10,
            "process_peak_rss_bytes": 20,
            "jax_device_memory_stats": stats,
            "bytes_in_use_source": "device",
            "jax_device_memory_summary": {
                "bytes_in_use_sum": 12,
                "bytes_in_use_min": 5,
                "bytes_in_use_max": 7,
                "bytes_limit_sum": 18,
                "bytes_limit_min": 9,
                "bytes_limit_max": 9,
            },
        },
        "peak": {
            "bytes_in_use": [6, 8],
            "bytes_in_use_total": 13,
            "process_rss_bytes": 21,
            "samples": 3,
            "source": "device",
            "error": None,
        },
        "ledger": {"kv": 12},
        "other_bytes": {},
        "plan_error_bytes": {"kv": 0},
        "compilations": 2,
        "compile_s": 0.0,
        "programs_loaded": 0,
        "outside_s": 0.0,
        "checks": [{"name": "freed", "expected": 1, "actual": 2, "passed": False, "detail": "why"}],
        "drop_info": {"deleted_buffers": 3},
    }


def test_the_numbers_of_a_training_step_are_metrics_that_make_curves():
    fields = {"train_step": 3, "loss": 1.5, "gradient_norm": 2.5, "step_memory": {"peak_bytes": 1}}
    added = metrics(a_record(fields=fields)).items() - metrics(a_record()).items()
    assert dict(added) == {"train/loss": 1.5, "train/gradient_norm": 2.5}
    assert metrics(a_record(fields={"loss": 1.5})) == metrics(a_record())


def test_rewards_are_curves_of_the_rollouts_and_of_the_steps_that_learn_from_them():
    rewards = {"reward_mean": 0.5, "reward_spread": 0.25}
    learnt = {"train_step": 3, "kl": 0.125, "clipped_share": 0.0, **rewards}
    policy = {"policy_difference": {"mean": 1e-6, "p99": 1e-5, "most": 1e-4}}
    added = [
        dict(metrics(a_record(fields=fields)).items() - metrics(a_record()).items())
        for fields in (rewards, learnt, policy)
    ]
    assert added == [
        {f"rollout/{name}": value for name, value in rewards.items()},
        {f"train/{name}": value for name, value in learnt.items() if name != "train_step"},
        {"policy/difference_mean": 1e-6, "policy/difference_most": 1e-4},
    ]


def test_the_metrics_of_a_phase_have_the_keys_that_dashboards_know():
    record = a_record(
        memory=Memory(10, 20, [{"bytes_in_use": 5, "num_allocs": 1}], "device"),
        peak=Peak((6,), 6, 21, 3, "device"),
        ledger={"kv": 12, "slot:param_dict": 4},
        plan_error_bytes={"kv": 0},
        compilations=2,
        fields={
            "drop_info": {"fused_bytes_total": 12, "fused_bytes_per_layer": 6, "note": "x"},
            "rebuild_info": {"deleted_buffers": 3},
            "num_params": 434,
            "same_output": 1,
            "text": "hello",
        },
    )
    assert metrics(record) == {
        "phase/idx": 3,
        "phase/name": "p",
        "time/elapsed_s": 2.0,
        "time/duration_s": 0.5,
        "time/outside_s": 0.0,
        "mem/process/rss_bytes": 10,
        "mem/process/peak_rss_bytes": 20,
        "compile/count": 2,
        "compile/seconds": 0.0,
        "compile/loaded": 0,
        "mem/jax/bytes_in_use_sum": 5,
        "mem/jax/bytes_in_use_min": 5,
        "mem/jax/bytes_in_use_max": 5,
        "mem/jax/device0/bytes_in_use": 5,
        "mem/jax/device0/num_allocs": 1,
        "mem/peak/bytes_in_use_total": 6,
        "mem/peak/device0/bytes_in_use": 6,
        "mem/peak/process_rss_bytes": 21,
        "mem/peak/samples": 3,
        "ledger/kv_bytes": 12,
        "ledger/slot:param_dict_bytes": 4,
        "plan/kv_error_bytes": 0,
        "kv/fused_bytes_total": 12,
        "kv/fused_bytes_per_layer": 6,
        "kv/deleted_buffers": 3,
        "num_params": 434,
        "determinism/same_output": 1,
    }


def test_a_record_from_before_there_were_peaks_or_loaded_programs_reads_without():
    written = a_record().to_json()
    for key in ("peak", "other_bytes", "programs_loaded", "outside_s"):
        del written[key]
    assert PhaseRecord.from_json(written) == a_record()


def test_without_jax_a_peak_has_no_device_metrics():
    values = metrics(a_record(peak=Peak((), 0, 21, 3)))
    assert {key for key in values if key.startswith("mem/peak/")} == {
        "mem/peak/process_rss_bytes",
        "mem/peak/samples",
    }


def test_a_field_that_one_device_lacks_is_not_summed():
    stats = [{"bytes_in_use": 5, "bytes_limit": 9}, {"bytes_in_use": 7}]
    assert set(Memory(1, 1, stats).jax_device_memory_summary) == {
        "bytes_in_use_sum",
        "bytes_in_use_min",
        "bytes_in_use_max",
    }


def test_without_jax_there_are_no_device_metrics():
    assert not [key for key in metrics(a_record()) if key.startswith("mem/jax")]


@pytest.mark.parametrize(("actual", "passes"), [(1, True), (2, False)])
def test_a_record_passes_if_all_its_checks_do(actual, passes):
    record = a_record(checks=[check_equal("a", 1, 1), check_equal("b", 1, actual)])
    assert record.passed is passes


def test_the_last_record_says_how_the_run_ended():
    record = RunFinished(
        "failed",
        1,
        "/runs/1",
        2.0,
        [check_equal("a", 1, 2)],
        "no",
        failing_phase="p",
        ledger={"kv": 3},
        planned=PlannedPhase("p", {"kv": 4}, 4, 2),
        command="python -m kvpipe",
        fields={"wandb": {}},
    )
    assert json.loads(record.line) == {
        "phase": RUN_FINISHED,
        "status": "failed",
        "exit_code": 1,
        "run_dir": "/runs/1",
        "elapsed_s": 2.0,
        "checks": [{"name": "a", "expected": 1, "actual": 2, "passed": False, "detail": ""}],
        "error": "no",
        "failing_phase": "p",
        "ledger": {"kv": 3},
        "planned": {
            "name": "p",
            "pools": {"kv": 4},
            "total_bytes": 4,
            "max_device_bytes": 2,
            "peak_device_bytes": 0,
            "temp_bytes": 0,
        },
        "command": "python -m kvpipe",
        "wandb": {},
    }


STARTED = RunStarted("tiny", {"a": {"b": [1]}}, ("jax_ready",), {"jax": "0.8"}, "2026-01-02T03:04")
ENDINGS = [
    STARTED,
    RunPlanned("cpu", 1, "0.0.2", (PlannedPhase("p", {"kv": 3}, 3, 3),), Fit(True, 9, "p", 4)),
    RunFinished("failed", 1, "/runs/1", 2.0, (check_equal("a", 1, 2),), "no", {"wandb": {}}),
]


@pytest.mark.parametrize("record", [*ENDINGS, a_record()], ids=lambda record: type(record).__name__)
def test_a_line_of_any_kind_reads_back_as_its_record(record):
    assert record_from_json(json.loads(record.line)) == record


def test_a_record_that_was_read_keeps_its_line_and_a_changed_one_has_its_own():
    line = json.dumps(a_record().to_json(), separators=(",", ":"))
    record = record_from_json(json.loads(line), line)
    assert record.line == line
    assert json.loads(replace(record, idx=4).line) == {**json.loads(line), "idx": 4}


def test_the_first_record_has_the_config_the_steps_and_the_versions():
    assert json.loads(STARTED.line) == {
        "phase": RUN_STARTED,
        "experiment": "tiny",
        "config": {"a": {"b": [1]}},
        "steps": ["jax_ready"],
        "versions": {"jax": "0.8"},
        "started_at": "2026-01-02T03:04",
        "skipped": [],
    }


def test_a_config_may_have_a_number_that_json_does_not_have():
    """``runner.idle_timeout_s=inf`` waits for ever, and is no reason not to run."""
    config = {"runner": {"idle_timeout_s": math.inf}, "list": [math.nan, 1.5]}
    record = RunStarted("tiny", config, (), {}, "")
    assert json.loads(record.line)["config"] == {
        "runner": {"idle_timeout_s": "inf"},
        "list": ["nan", 1.5],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_refused_and_not_written(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        json.loads(a_record(fields={"it": value}).line)


def test_a_phase_must_not_report_under_a_name_that_the_record_has():
    with pytest.raises(ValueError, match=r"phase 'p' reports \['ledger'\]"):
        a_record(fields={"ledger": {}}).to_json()


@pytest.mark.parametrize("value", [{1}, object(), PhaseRecord])
def test_a_value_that_json_lacks_is_refused_with_its_type(value):
    """A phase that reports one has to find it."""
    record = a_record(fields={"given": [value]})
    with pytest.raises(TypeError, match=f"Object of type {type(value).__name__} is not JSON"):
        _ = record.line
