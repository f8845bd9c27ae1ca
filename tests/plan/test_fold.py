from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.ledger import KV, PARAMS, PROGRAM, KvTokens, Ledger, Size, slot_pool
from kvpipe.pipeline.phase import Effect, WorkerPhase
from kvpipe.plan.fit import KvCapacity, fit_of
from kvpipe.plan.fold import (
    check_order,
    kv_capacities,
    plan_ledgers,
    plan_peaks,
    planned_phases,
)
from tests.helpers_config import build, default_names
from tests.refusal import refusal as refusal_of
from tests.sop import STEPS

# Bytes per device of a parameter set and of the KV cache; no sum of some equals one of another.
P, K = (1_000, 1_001), (30_000, 30_000)
SIZES = {Size.PARAMS: P, Size.KV: K, Size.PROGRAM: (0, 0)}
DICT, DICT2 = slot_pool("param_dict"), slot_pool("param_dict2")

READY = ["jax_ready", "engine_ready_dummy"]
SWAPPED = [
    *READY,
    "mllm_params_cpu_ready",
    "sglang_param_dict_ready",
    "weights_swapped_from_mllm",
]


def order(names, **options):
    return check_order(build(names, **options))


refusal = partial(refusal_of, order)


def accepted(names, **options):
    return [planned.step.step for planned in order(names, **options)] == names


def test_the_default_order_passes():
    assert accepted(default_names())


def test_generate_while_the_kv_cache_is_dropped_is_refused_with_the_step_that_dropped_it():
    names = [*SWAPPED, "kv_cache_dropped", "again"]
    assert refusal(names, again={"use": "generate"}) == (
        "pipeline: step 'again' needs the KV cache on the devices, but step 'kv_cache_dropped' "
        "removed it; put 'kv_cache_rebuilt' between"
    )


def test_generate_after_the_rebuild_is_accepted():
    names = [*SWAPPED, "kv_cache_dropped", "kv_cache_rebuilt", "again"]
    assert accepted(names, again={"use": "generate"})


def test_generate_on_dummy_weights_is_refused_by_default():
    assert refusal([*READY, "again"], again={"use": "generate"}) == (
        "pipeline: step 'again' needs real weights in the engine, but no step before it provides "
        "it; put 'weights_swapped_from_mllm' before it, or set weights=any for this step"
    )


def test_generate_on_dummy_weights_is_accepted_if_the_step_takes_any():
    assert accepted([*READY, "again"], again={"use": "generate", "weights": "any"})


def test_generate_on_an_engine_that_loads_the_checkpoint_itself_is_accepted():
    assert accepted(
        [*READY, "again"],
        engine_ready_dummy={"load_format": "auto"},
        again={"use": "generate"},
    )


def test_a_second_drop_is_refused_with_both_steps_named():
    names = [*READY, "kv_cache_dropped", "dropped_again"]
    assert refusal(names, dropped_again={"use": "kv_cache_dropped"}) == (
        "pipeline: step 'dropped_again' needs the KV cache on the devices, but step "
        "'kv_cache_dropped' removed it; put 'kv_cache_rebuilt' between"
    )


def test_a_rebuild_of_what_is_there_is_refused_with_the_step_that_made_it():
    assert refusal([*READY, "kv_cache_rebuilt"]) == (
        "pipeline: step 'kv_cache_rebuilt' requires the KV cache on the devices to be absent, but step "
        "'engine_ready_dummy' created it; leave the step out"
    )


RESIZED = [*READY, "kv_cache_dropped", "smaller", "away", "back", "away_again", "kv_cache_rebuilt"]
RESIZING = {
    "smaller": {"use": "kv_cache_rebuilt", "max_total_tokens": 99},
    "away": {"use": "kv_cache_offloaded"},
    "back": {"use": "kv_cache_restored"},
    "away_again": {"use": "kv_cache_dropped"},
}


def test_a_cache_rebuilt_to_another_capacity_has_it_until_a_rebuild_without_one():
    planned = check_order(build(RESIZED, **RESIZING))
    assert kv_capacities(planned) == {99}
    sizes = SIZES | {KvTokens(99): (10_000, 10_000)}
    held = [ledger.of(KV)[0] for ledger in plan_ledgers(planned, sizes, devices=2)]
    assert held == [0, 30_000, 0, 10_000, 0, 10_000, 0, 30_000]


def test_a_capacity_of_a_steps_own_counts_as_it_is_and_does_not_follow_max_total_tokens():
    names = [*READY, "kv_cache_dropped", "larger"]
    larger = {"larger": {"use": "kv_cache_rebuilt", "max_total_tokens": 499}}
    planned = check_order(build(names, **larger))
    ledgers = plan_ledgers(planned, SIZES | {KvTokens(499): (50_000, 50_000)}, devices=2)
    kv = KvCapacity(device_bytes=30_000, tokens=299, page_size=1)
    assert fit_of(planned, ledgers, 51_001, kv).max_total_tokens == 499
    too_full = fit_of(planned, ledgers, 51_000, kv)
    assert (too_full.fits, too_full.peak_phase, too_full.max_total_tokens) == (False, "larger", 0)


def test_a_capacity_of_no_tokens_is_refused():
    no_tokens = {"max_total_tokens": 0}
    assert refusal_of(build, ["kv_cache_rebuilt"], kv_cache_rebuilt=no_tokens) == (
        "phases.kv_cache_rebuilt.max_total_tokens is 0, it must be at least 1"
    )


def test_a_second_rebuild_is_refused_with_the_first():
    names = [*READY, "kv_cache_dropped", "kv_cache_rebuilt", "once_more"]
    assert (
        "requires the KV cache on the devices to be absent, but step 'kv_cache_rebuilt' created it"
        in (refusal(names, once_more={"use": "kv_cache_rebuilt"}))
    )


def swap_after_a_generate(*after_the_swap):
    return [
        *SWAPPED,
        "first",
        "second_dict",
        "second_swap",
        *after_the_swap,
    ]


def swap_options(**swap):
    return {
        "first": {"use": "generate"},
        "again": {"use": "generate"},
        "flush": {"use": "flush_cache"},
        "second_dict": {"use": "param_dict", "slot": "second"},
        "second_swap": {"use": "weights_swapped_from_mllm", "slot": "second"} | swap,
    }


def options_for(names, options):
    return {name: options[name] for name in names if name in options}


def test_a_swap_after_a_generate_needs_a_flush_before_the_next_generate():
    names = swap_after_a_generate("again")
    assert refusal(names, **options_for(names, swap_options(probe_tokens=0))) == (
        "pipeline: step 'again' requires a prefix cache that other weights have filled to be absent, but "
        "step 'second_swap' created it; flush the cache between the swap and the generate, or the ids "
        "are silently wrong"
    )


def test_a_swap_after_a_generate_is_accepted_with_a_flush_between_it_and_the_next_generate():
    names = swap_after_a_generate("flush", "again")
    assert accepted(names, **options_for(names, swap_options(probe_tokens=0)))


def test_the_probe_of_a_swap_refuses_a_prefix_cache_in_use_itself():
    names = swap_after_a_generate()
    assert refusal(names, **options_for(names, swap_options(probe_tokens=8))) == (
        "pipeline: step 'second_swap' requires a prefix cache in use to be absent, but step 'first' "
        "created it; flush the cache before it"
    )


def test_a_drop_with_the_prefix_cache_in_use_is_refused():
    names = [*SWAPPED, "first", "kv_cache_dropped"]
    assert refusal(names, first={"use": "generate"}) == (
        "pipeline: step 'kv_cache_dropped' requires a prefix cache in use to be absent, but step 'first' "
        "created it; flush the cache before it"
    )


def test_a_probe_of_a_swap_while_the_kv_cache_is_dropped_is_refused():
    names = [*SWAPPED[:-1], "kv_cache_dropped", "weights_swapped_from_mllm"]
    assert "'weights_swapped_from_mllm' needs the KV cache on the devices, but step " in (
        refusal(names)
    )


def test_a_swap_without_a_probe_while_the_kv_cache_is_dropped_is_accepted():
    names = [*SWAPPED[:-1], "kv_cache_dropped", "weights_swapped_from_mllm"]
    assert accepted(names, weights_swapped_from_mllm={"probe_tokens": 0})


STREAMED = [*READY, "weights_streamed"]


def test_a_generate_a_streamed_swap_and_a_generate_need_no_flush():
    names = [*STREAMED, "first", "streamed", "again"]
    options = {"first": {"use": "generate"}, "again": {"use": "generate"}}
    assert accepted(names, streamed={"use": "weights_streamed", "probe_tokens": 0}, **options)


def test_the_probe_of_a_streamed_swap_refuses_a_prefix_cache_in_use_no_more_than_the_swap_itself():
    names = [*STREAMED, "first", "streamed"]
    assert accepted(names, streamed={"use": "weights_streamed"}, first={"use": "generate"})


@pytest.mark.parametrize("away", ["weights_offloaded", "weights_dropped"])
def test_a_generate_while_the_weights_are_away_is_refused_with_the_step_that_took_them(away):
    assert refusal([*STREAMED, away, "again"], again={"use": "generate"}) == (
        "pipeline: step 'again' needs the engine's weights on the devices, but step "
        f"'{away}' removed it; put 'weights_restored' or a swap between "
        "(a swap needs none with probe_tokens=0)"
    )


EMPTY = ["jax_ready", "engine_ready_empty"]
UNPROBED = {"weights_streamed": {"probe_tokens": 0}}


def test_an_engine_that_starts_empty_generates_once_weights_are_streamed_in_and_not_before():
    generate = {"use": "generate", "weights": "any"}
    message = refusal([*EMPTY, "first"], first=generate)
    assert "'first' needs the engine's weights on the devices, but no step before it" in message
    assert "needs none with probe_tokens=0" in refusal([*EMPTY, "weights_streamed"])
    assert accepted([*EMPTY, "weights_streamed", "first"], first=generate, **UNPROBED)


@pytest.mark.parametrize("option", [{"load_format": "auto"}, {"precompile": True}])
def test_an_empty_start_refuses_what_needs_weights(option):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=f"{name} is {value!r}, but this step starts the engine"):
        build(EMPTY, engine_ready_empty=option)


def test_a_start_with_random_weights_holds_them_twice_at_its_peak_and_an_empty_one_never():
    dummy, empty = (started(names, 9_999) for names in (READY, [*EMPTY, "weights_streamed"]))
    assert dummy.peaks == (0, 2_500)
    assert empty.peaks == (0, 300, 300 + 1_001 + 100)


def test_the_peak_of_a_start_decides_what_fits():
    assert (started(READY, 2_500).fit.fits, started(READY, 2_499).fit.fits) == (True, False)
    fit = started(READY, 2_499).fit
    assert (fit.peak_phase, fit.temp_bytes, fit.max_total_tokens) == ("engine_ready_dummy", 0, 0)
    names = [*EMPTY, "weights_streamed"]
    assert (started(names, 1_401).fit.fits, started(names, 1_400).fit.fits) == (True, False)
    fit = started(names, 1_400).fit
    assert (fit.peak_phase, fit.max_total_tokens) == ("weights_streamed", 298)


def started(names, hbm_bytes):
    """Return the peaks of a start of small arrays, and whether it fits, beside 7 of temporaries."""
    sizes = {Size.PARAMS: P, Size.KV: (300, 300)}
    given = sizes | {Size.DUMMY_START: (2_500, 2_001), Size.LEAF: (100, 100)}
    planned = order(names, **(UNPROBED if "weights_streamed" in names else {}))
    ledgers = plan_ledgers(planned, sizes, devices=2)
    peaks = plan_peaks(planned, ledgers, given)
    fit = fit_of(
        planned, ledgers, hbm_bytes, KvCapacity(300, 299, 1), [7] * len(planned), peaks=peaks
    )
    return SimpleNamespace(peaks=peaks, fit=fit)


@pytest.mark.parametrize("away", ["weights_offloaded", "weights_dropped"])
def test_weights_that_are_away_cannot_be_taken_away_again(away):
    message = refusal([*STREAMED, away, "more"], more={"use": "weights_dropped"})
    assert f"'more' needs the engine's weights on the devices, but step '{away}'" in message


def test_offloaded_weights_are_real_again_after_a_restore():
    names = [*STREAMED, "weights_offloaded", "weights_restored", "again"]
    assert accepted(names, again={"use": "generate"})


def test_weights_cannot_be_restored_twice_nor_after_a_drop_or_a_swap():
    swap = {"use": "weights_streamed", "probe_tokens": 0}
    needs = "needs offloaded weights, but"
    assert needs in refusal([*STREAMED, "weights_restored"])
    assert needs in refusal([*STREAMED, "weights_dropped", "weights_restored"])
    names = [*STREAMED, "weights_offloaded", "swap", "weights_restored"]
    assert needs in refusal(names, swap=swap)


def test_after_a_drop_of_the_weights_either_swap_makes_a_generate_legal():
    swap = {"use": "weights_streamed", "probe_tokens": 0}
    names = [*STREAMED, "weights_dropped", "swap", "again"]
    assert accepted(names, swap=swap, again={"use": "generate"})
    names = [
        *STREAMED,
        "weights_dropped",
        "mllm_params_cpu_ready",
        "sglang_param_dict_ready",
        "weights_swapped_from_mllm",
        "again",
    ]
    probe = {"weights_swapped_from_mllm": {"probe_tokens": 0}}
    assert accepted(names, again={"use": "generate"}, **probe)


@pytest.mark.parametrize("use", ["weights_streamed", "weights_offloaded", "weights_dropped"])
def test_a_slot_that_shares_the_weights_must_be_released_before_they_are_freed(use):
    assert refusal([*SWAPPED, "it"], it={"use": use}) == (
        "pipeline: step 'it' requires an engine on the arrays of slot 'param_dict' to be absent, but "
        "step 'weights_swapped_from_mllm' created it; release slot 'param_dict' before it"
    )
    assert accepted([*SWAPPED, "after_cleanup", "it"], it={"use": use})


def test_the_ledger_follows_the_weights_off_the_devices_and_back():
    names = [*STREAMED, "weights_offloaded", "weights_restored", "weights_dropped", "swap"]
    planned = check_order(build(names, swap={"use": "weights_streamed", "probe_tokens": 0}))
    ledgers = plan_ledgers(planned, SIZES, devices=2)
    held = [ledger.pools.get(PARAMS) for ledger in ledgers]
    assert held == [None, P, P, None, P, None, P]


def test_a_slot_used_after_its_release_is_refused_with_the_step_that_released_it():
    names = [*SWAPPED, "after_cleanup", "param_sharing_check"]
    assert refusal(names) == (
        "pipeline: step 'param_sharing_check' needs a parameter set in slot 'param_dict', but step "
        "'after_cleanup' removed it; build slot 'param_dict' before it"
    )


def test_a_slot_that_was_never_built_is_refused():
    assert refusal([*READY, "weights_swapped_from_mllm"]) == (
        "pipeline: step 'weights_swapped_from_mllm' needs a parameter set in slot 'param_dict', "
        "but no step before it provides it; build slot 'param_dict' before it"
    )


def test_a_slot_released_twice_is_refused_with_both_steps_named():
    names = [*SWAPPED, "after_cleanup", "cleaned_again"]
    assert refusal(names, cleaned_again={"use": "release", "slots": ["param_dict"]}) == (
        "pipeline: step 'cleaned_again' needs a parameter set in slot 'param_dict', but step "
        "'after_cleanup' removed it; build slot 'param_dict' before it"
    )


def test_a_slot_built_twice_is_refused_with_both_steps_named():
    names = [*SWAPPED, "built_again"]
    assert refusal(names, built_again={"use": "param_dict", "slot": "param_dict"}) == (
        "pipeline: step 'built_again' requires a parameter set in slot 'param_dict' to be absent, but "
        "step 'sglang_param_dict_ready' created it; give the slot another name"
    )


def test_a_slot_built_from_released_host_parameters_is_refused():
    names = [
        *READY,
        "mllm_params_cpu_ready",
        "after_drop_mllm_params_cpu",
        "sglang_param_dict_ready",
    ]
    assert refusal(names) == (
        "pipeline: step 'sglang_param_dict_ready' needs the host parameters 'mllm', but step "
        "'after_drop_mllm_params_cpu' removed it; load 'mllm' before it"
    )


def test_host_parameters_loaded_twice_are_refused():
    names = ["mllm_params_cpu_ready", "loaded_again"]
    assert refusal(names, loaded_again={"use": "mllm_params_cpu_ready"}) == (
        "pipeline: step 'loaded_again' requires the host parameters 'mllm' to be absent, but step "
        "'mllm_params_cpu_ready' created it; give them another name"
    )


def test_a_sharing_check_of_a_slot_that_was_not_swapped_in_is_refused():
    names = [*SWAPPED[:-1], "param_sharing_check"]
    assert refusal(names) == (
        "pipeline: step 'param_sharing_check' needs an engine on the arrays of slot 'param_dict', "
        "but no step before it provides it; swap slot 'param_dict' in"
    )


def test_a_sharing_check_after_another_swap_is_refused_with_that_swap():
    names = [*SWAPPED, "second_dict", "second_swap", "param_sharing_check"]
    assert "an engine on the arrays of slot 'param_dict', but step 'second_swap' removed it" in (
        refusal(names, **options_for(names, swap_options()))
    )


def test_a_comparison_with_a_step_that_has_not_run_is_refused():
    names = [*SWAPPED, "generate_result_after_kv_rebuild"]
    options = {"generate_result_after_kv_rebuild": {"log_text": False}}
    assert refusal(names, **options) == (
        "pipeline: step 'generate_result_after_kv_rebuild' needs the output of step "
        "'generate_result', but no step before it provides it; put step 'generate_result' before it"
    )


def test_a_comparison_with_itself_is_refused():
    names = [*SWAPPED, "it"]
    message = refusal(names, it={"use": "generate", "same_output_as": "it"})
    assert "step 'it' needs the output of step 'it', but no step before it provides it" in message


def test_media_for_wandb_without_a_wandb_run_are_refused():
    assert refusal([*SWAPPED, "generate_result"]) == (
        "pipeline: step 'generate_result' needs a W&B run, but no step before it provides it; "
        "put 'wandb_init' first, or log_text=false"
    )


def test_wandb_init_after_a_step_of_the_worker_is_refused():
    assert "'wandb_init' runs before the engine's process is started" in (
        refusal([*READY, "wandb_init"])
    )


def test_an_engine_before_the_devices_is_refused():
    assert refusal(["engine_ready_dummy"]) == (
        "pipeline: step 'engine_ready_dummy' needs the JAX devices, but no step before it provides "
        "it; put 'jax_ready' before it"
    )


def test_a_second_engine_is_refused():
    names = [*READY, "second"]
    assert refusal(names, second={"use": "engine_ready_dummy"}) == (
        "pipeline: step 'second' requires a started engine to be absent, but step 'engine_ready_dummy' "
        "created it; leave the step out"
    )


@pytest.mark.parametrize(
    ("step", "use", "options"),
    [
        ("a", "generate", {"weights": "any"}),
        ("a", "flush_cache", {}),
        ("a", "kv_cache_dropped", {}),
        ("a", "kv_cache_rebuilt", {}),
        ("a", "weights_swapped_from_mllm", {}),
        ("a", "param_dict", {"slot": "x"}),
    ],
)
def test_what_works_on_the_engine_is_refused_without_one(step, use, options):
    assert refusal(["jax_ready", step], **{step: {"use": use} | options}) == (
        "pipeline: step 'a' needs a started engine, but no step before it provides it; "
        "put 'engine_ready_dummy' before it"
    )


def test_every_fact_that_a_default_step_may_miss_or_meet_has_a_meaning():
    for planned in check_order(build(default_names())):
        for fact in (*planned.effect.needs, *planned.effect.forbids):
            assert facts.meaning(fact).what


# Pools after each step of the SOP, written by hand.
EXPECTED = {
    "wandb_init": {},
    "jax_ready": {},
    "engine_ready_dummy": {PARAMS: P, KV: K},
    "mllm_params_cpu_ready": {PARAMS: P, KV: K},
    "sglang_param_dict_ready": {PARAMS: P, KV: K, DICT: P},
    "weights_swapped_from_mllm": {PARAMS: P, KV: K},
    "param_sharing_check": {PARAMS: P, KV: K},
    "after_cleanup": {PARAMS: P, KV: K},
    "generate_result": {PARAMS: P, KV: K},
    "flush_cache_before_kv_drop": {PARAMS: P, KV: K},
    "kv_cache_dropped": {PARAMS: P},
    "sglang_param_dict2_ready": {PARAMS: P, DICT2: P},
    "after_drop_mllm_params_cpu": {PARAMS: P, DICT2: P},
    "kv_cache_rebuilt": {PARAMS: P, KV: K, DICT2: P},
    "generate_result_after_kv_rebuild": {PARAMS: P, KV: K, DICT2: P},
    "after_drop_param_dict2": {PARAMS: P, KV: K},
}


def test_the_ledger_after_each_step_of_the_sop_is_the_expected_one():
    planned = check_order(build(STEPS))
    ledgers = plan_ledgers(planned, SIZES, devices=2)
    found = {p.step.step: led.pools for p, led in zip(planned, ledgers, strict=True)}
    assert found == EXPECTED


class Unusual(WorkerPhase):
    """Fills a slot with something that is no parameter set, and the engine's programs."""

    effect = Effect(adds=(facts.slot("odd"),), pools={slot_pool("odd"): Size.KV, PROGRAM: Size.KV})


def test_a_pool_that_a_phase_names_keeps_its_size_until_the_facts_change_it():
    names = ["jax_ready", "gone"]
    jax, release = build(names, gone={"use": "release", "slots": ["odd"]})
    planned = check_order([Unusual("odd"), jax, release])
    held = [ledger.pools for ledger in plan_ledgers(planned, SIZES, devices=2)]
    named = {slot_pool("odd"): K, PROGRAM: K}
    assert held == [named, named, {PROGRAM: K}]


def test_the_second_swap_gives_the_bytes_of_the_first_slot_back_to_that_slot():
    """Until then the first slot shared its arrays with the engine, and so held none itself."""
    names = [*SWAPPED, "second_dict", "second_swap"]
    planned = check_order(build(names, **options_for(names, swap_options())))
    *_, before, after = plan_ledgers(planned, SIZES, devices=2)
    assert before.pools == {PARAMS: P, KV: K, slot_pool("second"): P}
    assert after.pools == {PARAMS: P, KV: K, DICT: P}


def test_a_record_of_the_plan_has_the_sums_and_the_fullest_device():
    planned = check_order(build(SWAPPED))
    ledgers = plan_ledgers(planned, SIZES, devices=2)
    peaks = [0, 0, 7, 32_007, 0]
    before, record = planned_phases(planned, ledgers, peaks, range(len(planned)))[2:4]
    assert before.peak_device_bytes == before.max_device_bytes > 7  # what is there after it counts
    assert record.name == "sglang_param_dict_ready"
    assert record.pools == {PARAMS: 2_001, KV: 60_000, DICT: 2_001}
    assert record.total_bytes == 64_002
    assert (record.max_device_bytes, record.peak_device_bytes) == (32_002, 32_007)
    assert record.temp_bytes == 3


def verdict(hbm_bytes, page_size=1, tokens=299):
    """Return the fit of the SOP: at most P + K + P = 32002 bytes on a device."""
    planned = check_order(build(STEPS))
    ledgers = plan_ledgers(planned, SIZES, devices=2)
    return fit_of(planned, ledgers, hbm_bytes, KvCapacity(K[0], tokens, page_size))


def test_a_plan_fits_devices_that_hold_its_peak_to_the_byte():
    assert verdict(32_002).fits
    assert not verdict(32_001).fits


def test_the_first_of_several_equal_peaks_is_named():
    assert verdict(32_002).peak_phase == "sglang_param_dict_ready"


def test_the_largest_capacity_that_fits_is_the_planned_one_exactly_at_the_limit():
    """100 bytes a token: (299 tokens + 1 page) × 100 = 30000."""
    assert verdict(32_002).max_total_tokens == 299
    assert verdict(32_001).max_total_tokens == 298
    assert verdict(32_102).max_total_tokens == 300


def test_the_largest_capacity_is_whole_pages():
    assert verdict(32_002, page_size=100, tokens=200).max_total_tokens == 200
    assert verdict(32_001, page_size=100, tokens=200).max_total_tokens == 100


def test_no_capacity_helps_where_the_parameters_alone_do_not_fit():
    """A step without a KV cache may be what is too full; a smaller cache is no advice then."""
    assert verdict(2_001).max_total_tokens == 0
    planned = check_order(build([*READY, "kv_cache_dropped"]))
    ledgers = (
        Ledger(1),
        Ledger(1, {PARAMS: (5,), KV: (300,)}),
        Ledger(1, {PARAMS: (500,)}),
    )
    fit = fit_of(planned, ledgers, 400, KvCapacity(300, 299, 1))
    assert (fit.fits, fit.peak_phase, fit.max_total_tokens) == (False, "kv_cache_dropped", 0)


class Devices:
    """An independent account of the effects of the SOP's steps, as a person would keep it."""

    def __init__(self):
        self.jax = self.engine = self.wandb = self.real = self.used = self.kv = False
        self.host, self.slots, self.shared, self.outputs = set(), set(), set(), set()

    def may(self, name):
        """Whether the step may come now; nothing changes."""
        swap = self.engine and self.kv and not self.used and "param_dict" in self.slots
        generate = self.engine and self.kv and self.real and self.wandb
        return {
            "wandb_init": True,
            "jax_ready": True,
            "engine_ready_dummy": self.jax and not self.engine,
            "mllm_params_cpu_ready": "mllm" not in self.host,
            "sglang_param_dict_ready": self.engine and "mllm" in self.host,
            "weights_swapped_from_mllm": swap,
            "param_sharing_check": "param_dict" in self.slots & self.shared,
            "after_cleanup": "param_dict" in self.slots,
            "generate_result": generate,
            "flush_cache_before_kv_drop": self.engine,
            "kv_cache_dropped": self.engine and self.kv and not self.used,
            "sglang_param_dict2_ready": self.engine and "mllm" in self.host,
            "after_drop_mllm_params_cpu": "mllm" in self.host,
            "kv_cache_rebuilt": self.engine and not self.kv,
            "generate_result_after_kv_rebuild": generate and "generate_result" in self.outputs,
            "after_drop_param_dict2": "param_dict2" in self.slots,
        }[name]

    def do(self, name):
        """Let the step happen."""
        match name:
            case "wandb_init":
                self.wandb = True
            case "jax_ready":
                self.jax = True
            case "engine_ready_dummy":
                self.engine = self.kv = True
            case "mllm_params_cpu_ready":
                self.host.add("mllm")
            case "sglang_param_dict_ready":
                self.slots.add("param_dict")
            case "weights_swapped_from_mllm":
                self.real = True
                self.shared.add("param_dict")
            case "after_cleanup":
                self.slots.remove("param_dict")
            case "generate_result" | "generate_result_after_kv_rebuild":
                self.used = True
                self.outputs.add(name)
            case "flush_cache_before_kv_drop":
                self.used = False
            case "kv_cache_dropped":
                self.kv = False
            case "sglang_param_dict2_ready":
                self.slots.add("param_dict2")
            case "after_drop_mllm_params_cpu":
                self.host.remove("mllm")
            case "kv_cache_rebuilt":
                self.kv = True
            case "after_drop_param_dict2":
                self.slots.remove("param_dict2")


@st.composite
def orders(draw):
    """Orders of the SOP's steps, wandb_init first: any, or the SOP's with a few moved."""
    first, *rest = STEPS
    if draw(st.booleans()):
        return [first, *draw(st.permutations(rest))]
    for _ in range(draw(st.integers(1, 3))):
        moved = rest.pop(draw(st.integers(0, len(rest) - 1)))
        rest.insert(draw(st.integers(0, len(rest))), moved)
    return [first, *rest]


@settings(max_examples=400)
@given(orders())
@example(STEPS)
def test_an_order_is_accepted_exactly_if_a_person_would_and_its_ledgers_are_consistent(names):
    devices = Devices()
    first_illegal = None
    pools = []
    for name in names:
        if not devices.may(name):
            first_illegal = name
            break
        devices.do(name)
        own = devices.slots - devices.shared
        pools.append(
            ({PARAMS: P} if devices.engine else {})
            | ({KV: K} if devices.kv else {})
            | {slot_pool(slot): P for slot in own}
        )
    event("refused" if first_illegal else "accepted")
    if first_illegal:
        assert refusal(names).startswith(f"pipeline: step '{first_illegal}' ")
        return
    planned = check_order(build(names))
    ledgers = plan_ledgers(planned, SIZES, devices=2)
    assert [ledger.pools for ledger in ledgers] == pools
