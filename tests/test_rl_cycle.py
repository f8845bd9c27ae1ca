"""The rollout and training cycle: its order, its plan, and cycles of it on the real engine."""

from collections import Counter
from itertools import pairwise

import pytest

from kvpipe.pipeline import facts
from kvpipe.pipeline.ledger import KV, PARAMS, TRAINER_PROGRAM, TRAINER_SETS, Size, slot_pool
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fit import KvCapacity, fit_of, temporaries
from kvpipe.plan.fold import check_order, plan_ledgers
from kvpipe.records.run import Program
from tests import conftest
from tests.command import Finished, kvpipe, programs
from tests.helpers_config import build, compose_plain, config_of
from tests.refusal import refusal

READY = ["jax_ready", "engine_ready_dummy"]
TRAINED = [*READY, "trainer_ready", "train_step"]
GENERATE = {"again": {"use": "generate"}}


def refused(names, **options):
    return refusal(check_order, build(names, **options))


def accepted(names, **options):
    return [planned.step.step for planned in check_order(build(names, **options))] == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["jax_ready", "trainer_ready"],
            "'trainer_ready' needs a started engine, but no step before it provides it",
        ),
        (
            [*READY, "train_step"],
            "'train_step' needs a trainer on the devices, but no step before it provides it; "
            "put 'trainer_ready' before it, or 'trainer_restored' between",
        ),
        (
            [*READY, "trainer_ready", "trainer_offloaded", "train_step"],
            "needs a trainer on the devices, but step 'trainer_offloaded' removed it",
        ),
        (
            [*READY, "trainer_ready", "trainer_offloaded", "weights_synced"],
            "'weights_synced' needs a trainer on the devices, but step 'trainer_offloaded'",
        ),
        (
            [*READY, "trainer_ready", "trainer_restored"],
            "needs an offloaded trainer, but no step before it provides it; "
            "put 'trainer_offloaded' before it",
        ),
        (
            [*READY, "trainer_ready", "trainer_dropped", "weights_synced"],
            "needs a trainer on the devices, but step 'trainer_dropped' removed it",
        ),
        (
            [*TRAINED, "trainer_dropped"],
            "'trainer_dropped' requires trained weights that are not synced to the engine to be absent, but "
            "step 'train_step' created it; put 'weights_synced' between, or set unsynced=true for this",
        ),
        ([*READY, "trainer_dropped"], "'trainer_dropped' needs a trainer on the devices"),
    ],
)
def test_a_trainer_in_the_wrong_place_is_refused_with_the_step_to_blame(names, message):
    assert message in refused(names)


def test_a_second_trainer_is_refused_wherever_the_first_one_is():
    second = {"second": {"use": "trainer_ready"}}
    message = refused([*READY, "trainer_ready", "second"], **second)
    assert (
        "requires a trainer on the devices to be absent, but step 'trainer_ready' created it"
        in message
    )
    message = refused([*READY, "trainer_ready", "trainer_offloaded", "second"], **second)
    assert (
        "requires an offloaded trainer to be absent, but step 'trainer_offloaded' created it"
        in message
    )
    assert accepted([*READY, "trainer_ready", "trainer_dropped", "second"], **second)


def test_trained_weights_are_dropped_once_the_engine_has_them_or_on_demand():
    assert accepted([*TRAINED, "weights_synced", "trainer_dropped"])
    assert accepted([*TRAINED, "trainer_dropped"], trainer_dropped={"unsynced": True})
    assert accepted(
        [*TRAINED, "trainer_offloaded", "trainer_dropped"], trainer_dropped={"unsynced": True}
    )


def test_a_generate_after_training_needs_no_sync_and_a_sync_leaves_real_weights_and_no_prefix():
    streamed = [*READY, "weights_streamed", "trainer_ready", "train_step"]
    assert accepted([*streamed, "again"], **GENERATE)
    message = refused([*TRAINED, "again"], **GENERATE)
    assert "needs real weights in the engine" in message
    first = {"first": {"use": "generate", "weights": "any"}}
    names = [*READY, "first", "trainer_ready", "train_step", "weights_synced"]
    *_, synced = check_order(build(names, **first))
    assert {facts.WEIGHTS_REAL, facts.WEIGHTS_LIVE} <= synced.facts
    assert not {facts.KV_WRITTEN, facts.TRAINER_AHEAD} & synced.facts
    assert accepted([*names, "kv_cache_dropped"], **first)


def test_a_sync_brings_offloaded_weights_and_takes_their_host_copy_away():
    names = [*READY, "trainer_ready", "weights_offloaded", "weights_synced"]
    assert accepted([*names, "again"], **GENERATE)
    assert "needs offloaded weights, but step 'weights_synced'" in (
        refused([*names, "weights_restored"])
    )


def test_a_slot_that_shares_the_weights_must_be_released_before_a_sync():
    names = [*READY, "mllm_params_cpu_ready", "sglang_param_dict_ready"]
    names += ["weights_swapped_from_mllm", "trainer_ready", "weights_synced"]
    assert "release slot 'param_dict' before it" in refused(names)


def test_a_peak_is_compared_with_an_earlier_step_and_only_without_the_kv_cache():
    kept = {"kept": {"use": "train_step"}, "train_step": {"peak_below": "kept"}}
    names = [*READY, "trainer_ready", "kept", "kv_cache_dropped", "train_step"]
    assert accepted(names, **kept)
    assert "'train_step' requires the KV cache on the devices to be absent" in (
        refused([name for name in names if name != "kv_cache_dropped"], **kept)
    )
    without = [name for name in names if name != "kept"]
    message = refused(without, train_step={"peak_below": "kept"})
    assert (
        "needs the training of step 'kept', but no step before it provides it; put step" in message
    )


@pytest.mark.parametrize("slot", TRAINER_SETS)
def test_a_parameter_set_may_not_be_called_as_one_of_the_trainers(slot):
    message = refusal(build, ["it"], it={"use": "param_dict", "slot": str(slot)})
    assert f"phases.it.slot is '{slot}', the name of one of the trainer's" in message


def test_trainer_ready_takes_a_host_tree_that_is_there():
    source = {"trainer_ready": {"source": "mllm"}}
    assert "needs the host parameters 'mllm'" in refused([*READY, "trainer_ready"], **source)
    assert accepted([*READY, "mllm_params_cpu_ready", "trainer_ready"], **source)


SIZES = {
    Size.PARAMS: (10, 10),
    Size.KV: (300, 300),
    Size.TRAINER_PARAMS: (20, 20),
    Size.TRAINER_GRADIENTS: (21, 21),
    Size.TRAINER_MOMENTS: (45, 45),
    Size.TRAINER_PROGRAM: (0, 0),
    Size.PROGRAM: (0, 0),
}
SETS = {slot_pool(size): SIZES[size] for size in TRAINER_SETS}


def test_the_ledger_follows_the_trainer_to_the_host_and_back():
    names = [*READY, "trainer_ready", "trainer_offloaded", "trainer_restored", "trainer_dropped"]
    ledgers = plan_ledgers(check_order(build(names)), SIZES, devices=2)
    engine = {PARAMS: (10, 10), KV: (300, 300)}
    held = [engine | SETS, engine, engine | SETS, engine]
    assert [ledger.pools for ledger in ledgers[2:]] == held


def test_temporaries_of_a_step_are_those_of_the_programs_that_it_runs():
    def program(name, temp_bytes):
        return Program(name, 0, 0, 1, temp_bytes, 0.0)

    programs = [program("prefill", 5), program("decode", 7), program("train_step", 100)]
    programs.append(program("weight_sync", 30))
    names = [*READY, "kv_cache_dropped", "trainer_ready", "train_step", "weights_synced"]
    planned = check_order(build(names))
    # The engine's steps need a KV cache.
    assert [temporaries(item, programs) for item in planned] == [0, 7, 0, 0, 100, 30]
    assert temporaries(planned[4], ()) == 0


def test_what_fits_counts_the_temporaries_of_each_step_where_it_runs():
    names = [*READY, "kv_cache_dropped", "trainer_ready", "train_step"]
    planned = check_order(build(names))
    ledgers = plan_ledgers(planned, SIZES, devices=2)
    capacity = KvCapacity(300, 299, 1)

    def fit(hbm_bytes, train):
        return fit_of(planned, ledgers, hbm_bytes, capacity, [0, 3, 0, 0, train])

    quiet, loud = fit(313, 4), fit(313, 218)
    assert (quiet.fits, quiet.peak_phase, quiet.temp_bytes) == (True, "engine_ready_dummy", 3)
    assert (loud.fits, loud.peak_phase, loud.temp_bytes) == (False, "train_step", 218)
    assert (quiet.max_total_tokens, loud.max_total_tokens) == (299, 0)
    assert not fit(312, 4).fits
    assert fit(312, 4).max_total_tokens == 298


def test_steps_of_a_later_cycle_refer_to_their_own_cycle_or_to_the_one_before():
    steps = build_steps(config_of(compose_plain("+experiment=tiny_rl_cycle", "repeat.times=3")))
    check_order(steps)
    found = {step.step: step for step in steps}
    rollouts = [found[f"generate_rollout{mark}"] for mark in ("", "#2", "#3")]
    assert [step.same_output_as for step in rollouts] == [
        None,
        "generate_trained",
        "generate_trained#2",
    ]
    trained = [found[f"generate_trained{mark}"] for mark in ("", "#2", "#3")]
    assert [(step.same_output_as, step.different_output_from) for step in trained] == [
        (None, "generate_rollout"),
        (None, "generate_rollout#2"),
        (None, "generate_rollout#3"),
    ]
    peaks = [found[f"train_step{mark}"].peak_below for mark in ("", "#2", "#3")]
    assert peaks == ["train_step_kv_kept", "train_step_kv_kept#2", "train_step_kv_kept#3"]
    assert found["train_step_kv_kept#2"].peak_below is None


def test_with_the_cache_kept_the_cycle_is_the_same_without_its_drop_and_rebuild():
    dropped = compose_plain("pipeline=rl_cycle")
    kept = compose_plain("+experiment=qwen25_3b_rl_cycle", "pipeline=rl_cycle_kv_kept")
    kv_cache = [step for step in dropped["pipeline"] if step.startswith("kv_cache")]
    flush = {"flush_cache_before_kv_drop": "flush_cache_before_training"}
    renamed = [flush.get(step, step) for step in dropped["pipeline"] if step not in kv_cache]
    assert kept["pipeline"] == renamed
    assert len(kv_cache) == 4
    for plain in (dropped, kept):
        assert check_order(build_steps(config_of(plain)))


# A byte that drifts is seen from the third cycle on, in whose second nothing is compiled any more.
TIMES = [
    pytest.param(3, marks=pytest.mark.small),
    pytest.param(10, marks=pytest.mark.nightly(finds="a drift that begins after 3 cycles")),
]


@pytest.fixture(scope="module", params=TIMES, ids="{} cycles".format)
def cycles(request, tmp_path_factory):
    """The number of cycles of the tiny experiment, and the run that ended after them."""
    times = request.param
    cwd = tmp_path_factory.mktemp("rl")
    few = (*conftest.SIZES, conftest.ONE_LAYER, "engine.tp_size=2", "sampling.max_new_tokens=8")
    options = ("tracking=disabled", f"repeat.times={times}", *few)
    run = kvpipe(cwd, "+experiment=tiny_rl_cycle", *options)
    assert run.exit_code == 0, run.end["error"]
    return times, run


def phases(run: Finished):
    """Return the records of a run's phases, by name."""
    return {line["phase"]: line for line in run.lines if "duration_s" in line}


@pytest.mark.slow
def test_cycles_of_rollout_and_training_do_not_drift_by_a_byte(cycles):
    times, run = cycles
    steps = phases(run)
    assert run.end["status"] == "passed"
    plan = {phase["name"]: phase["pools"] for phase in run.phase("run_planned")["phases"]}
    for name, record in steps.items():
        assert record["ledger"].keys() <= plan[name].keys() | {"other"}, name
        assert {pool: record["ledger"][pool] for pool in plan[name]} == plan[name], name
    ledgers = {}
    for name, record in steps.items():
        ledgers.setdefault(name.partition("#")[0], []).append(record["ledger"])
    repeated = [held for held in ledgers.values() if len(held) > 1]
    assert {len(held) for held in repeated} == {times}
    assert all(ledger == held[0] for held in repeated for ledger in held)


@pytest.mark.slow
def test_after_the_first_cycle_nothing_is_compiled(cycles):
    times, run = cycles
    steps = phases(run)
    later = {name: programs(record) for name, record in steps.items() if "#" in name}
    assert len(later) == (times - 1) * 11
    assert set(later.values()) == {0}
    assert programs(steps["train_step_kv_kept"]) > 0
    assert programs(steps["train_step"]) == 0


@pytest.mark.slow
def test_every_cycle_holds_its_contracts(cycles):
    times, run = cycles
    steps = phases(run)
    counted = Counter(check["name"] for check in run.end["checks"])
    once_a_cycle = ("different_output", "kv_drop_lowers_peak", "restore_brings_trainer")
    assert [counted[name] for name in once_a_cycle] == [times] * 3
    assert (counted["sync_leaves_one_set"], counted["step_is_in_place"]) == (2 * times, 2 * times)
    assert counted["same_output"] == times - 1
    assert counted["cycle_ledger"] == (times - 2) * 11
    for cycle in range(1, times + 1):
        mark = "" if cycle == 1 else f"#{cycle}"
        kept, dropped = (steps[f"{step}{mark}"] for step in ("train_step_kv_kept", "train_step"))
        lower = kept["step_memory"]["peak_bytes"] - dropped["step_memory"]["peak_bytes"]
        assert lower == kept["ledger"]["kv"] > 0
        assert dropped["gradients"] == "seeded"
        assert (kept["train_step"], dropped["train_step"]) == (2 * cycle - 1, 2 * cycle)
        assert steps[f"weights_synced{mark}"]["trained_steps"] == 2 * cycle
    outputs = [record["token_ids"] for name, record in steps.items() if "generate_trained" in name]
    assert len(outputs) == times
    assert all(a != b for a, b in pairwise(outputs))
    assert TRAINER_PROGRAM not in steps["train_step"]["ledger"]
