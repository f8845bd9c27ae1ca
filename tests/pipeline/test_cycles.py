import pytest

from kvpipe.config.schema import Kvpipe, RepeatConfig
from kvpipe.errors import InputError
from kvpipe.pipeline.cycles import base_name, cycle_of, repeated
from kvpipe.pipeline.ledger import Ledger
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fold import check_order
from kvpipe.records.run import Memory
from kvpipe.worker.drift import Drift
from kvpipe.worker.measurement import Measurement
from tests.helpers_config import compose_plain, config_of

PIPELINE = ["start", "generate", "flush", "drop", "rebuild", "end"]


def test_a_stretch_is_repeated_with_the_cycle_in_each_name():
    names = repeated(PIPELINE, RepeatConfig("generate", "flush", 3))
    assert names == [
        "start",
        "generate",
        "flush",
        "generate#2",
        "flush#2",
        "generate#3",
        "flush#3",
        "drop",
        "rebuild",
        "end",
    ]
    assert [base_name(name) for name in names[3:5]] == ["generate", "flush"]
    assert [cycle_of(name) for name in names[2:4]] == [1, 2]


def test_without_a_repeat_and_with_one_cycle_the_pipeline_is_unchanged():
    assert repeated(PIPELINE, None) == repeated(PIPELINE, RepeatConfig("drop", "drop", 1))
    assert repeated(PIPELINE, None) == PIPELINE


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("genrate", "flush", "repeat.first: the pipeline has no step 'genrate'; did you mean"),
        ("generate", "rebuld", "repeat.last: the pipeline has no step 'rebuld'"),
        ("drop", "flush", "repeat: 'flush' comes before 'drop' in the pipeline"),
    ],
)
def test_a_stretch_that_is_not_in_the_pipeline_is_refused(first, last, message):
    with pytest.raises(InputError, match=message):
        repeated(PIPELINE, RepeatConfig(first, last, 2))


def test_more_steps_than_can_be_read_are_refused_before_they_are_made():
    last = RepeatConfig("generate", "flush", 49_998)
    assert len(repeated(PIPELINE, last)) == 100_000
    with pytest.raises(InputError) as caught:
        repeated(PIPELINE, RepeatConfig("generate", "flush", 10**12))
    assert str(caught.value) == (
        "repeat.times is 1000000000000: the pipeline has 2,000,000,000,004 steps, at most 100,000 "
        "can run"
    )
    with pytest.raises(InputError, match="pipeline: the pipeline has 100,001 steps"):
        repeated([str(step) for step in range(100_001)], None)


def test_what_the_order_check_keeps_of_a_step_does_not_grow_with_the_cycles():
    """Each step had a copy of the outputs before it: 10,000 cycles took 7 GB, and did not end."""
    plain = compose_plain("+experiment=tiny_cycles", "repeat.times=50")
    planned = check_order(build_steps(config_of(plain)))
    assert len(planned) == 7 + 50 * 4
    assert planned[-1].facts == planned[-5].facts == planned[10].facts
    assert max(len(step.facts) for step in planned) < 12


def test_a_count_of_cycles_below_one_is_refused():
    with pytest.raises(InputError, match=r"repeat\.times is 0"):
        RepeatConfig("a", "b", 0)


def test_every_later_cycle_compares_its_output_with_the_first():
    plain = compose_plain("+experiment=tiny_cycles", "repeat.times=3")
    steps = build_steps(config_of(plain))
    check_order(steps)
    compared = {step.step: step.same_output_as for step in steps if "generate" in step.step}
    assert compared == {
        "generate_result": None,
        "generate_result#2": "generate_result",
        "generate_result#3": "generate_result",
    }


def test_a_slot_that_is_filled_in_every_cycle_and_never_released_is_refused():
    config = Kvpipe(**{"pipeline": ["a"], "phases": {"a": {"use": "jax_ready"}}})
    config.pipeline = ["jax_ready", "engine_ready_dummy", "mllm_params_cpu_ready", "param_dict"]
    config.phases = {"param_dict": {"slot": "x"}}
    config.engine.max_total_tokens = 64
    config.repeat = RepeatConfig("param_dict", "param_dict", 2)
    with pytest.raises(InputError, match="'param_dict#2' requires a parameter set in slot"):
        check_order(build_steps(config))


def measured(kv: int, rss: int = 1000, **others: int) -> Measurement:
    pools = {"kv": kv, **others}
    return Measurement(Memory(rss, rss), Ledger(1, {pool: (n,) for pool, n in pools.items()}))


def test_drift_is_measured_from_the_second_cycle_and_checked_from_the_third():
    drift = Drift()
    assert drift.compare("drop", measured(8), 5).checks == ()
    second = drift.compare("drop#2", measured(9, 1500), 5)
    assert (dict(second.fields), second.checks) == ({"cycle": 2, "rss_drift_bytes": 0}, ())
    third = drift.compare("drop#3", measured(9, 1700), 5)
    assert third.fields["rss_drift_bytes"] == 200
    assert [check.passed for check in third.checks] == [True]
    (failed,) = drift.compare("drop#4", measured(10), 5).checks
    assert (failed.passed, failed.expected, failed.actual) == (False, {"kv": 9}, {"kv": 10})


@pytest.mark.parametrize(("compiled", "passes"), [(5, False), (6, True)])
def test_code_drifts_only_if_nothing_was_compiled_since_the_cycle_before(
    compiled: int, passes: bool
) -> None:
    """The engine's step after the last token may compile a small program in any cycle."""
    drift = Drift()
    for cycle in ("generate", "generate#2"):
        drift.compare(cycle, measured(8, program=100), 5)
    (check,) = drift.compare("generate#3", measured(8, program=101), compiled).checks
    assert check.passed == passes
    (check,) = drift.compare("generate#4", measured(9, program=102), 7).checks
    assert not check.passed


def test_steps_that_are_not_repeated_are_not_compared():
    drift = Drift()
    for _ in range(3):
        assert drift.compare("drop", measured(8), 5).checks == ()
