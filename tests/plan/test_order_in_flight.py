"""Steps that are allowed and refused while a paused rollout's requests are in flight."""

from functools import partial

import pytest

from kvpipe.plan.fold import check_order
from tests.helpers_config import build
from tests.refusal import refusal as refusal_of

READY = ["jax_ready", "engine_ready_dummy", "weights_streamed"]
PAUSED = [*READY, "rollout_paused"]


def order(names, **options):
    return check_order(build(names, **options))


refusal = partial(refusal_of, order)


@pytest.mark.parametrize(
    ("use", "options"),
    [
        ("flush_cache", {}),
        ("kv_cache_dropped", {}),
        ("generate", {}),
        ("rollout", {}),
        ("rollout_paused", {}),
        ("weights_streamed", {"probe_tokens": 8}),
    ],
)
def test_what_would_disturb_requests_in_flight_is_refused_with_the_step_that_left_them(
    use, options
):
    assert refusal([*PAUSED, "it"], it={"use": use} | options) == (
        "pipeline: step 'it' requires a paused rollout with requests in flight to be absent, but step "
        "'rollout_paused' created it; put 'rollout_resumed' between"
    )


def test_a_resume_with_nothing_under_way_is_refused():
    assert refusal([*READY, "rollout_resumed"]) == (
        "pipeline: step 'rollout_resumed' needs a paused rollout with requests in flight, but no step "
        "before it provides it; put 'rollout_paused' before it"
    )
    assert refusal([*PAUSED, "rollout_resumed", "again"], again={"use": "rollout_resumed"}) == (
        "pipeline: step 'again' needs a paused rollout with requests in flight, but step "
        "'rollout_resumed' removed it; put 'rollout_paused' before it"
    )


def test_a_resume_without_the_offloaded_cache_is_refused():
    assert refusal([*PAUSED, "kv_cache_offloaded", "rollout_resumed"]) == (
        "pipeline: step 'rollout_resumed' needs the KV cache on the devices, but step "
        "'kv_cache_offloaded' removed it; put 'kv_cache_restored' between"
    )


OFFLOADED = [*PAUSED, "kv_cache_offloaded"]
SYNCED = ["trainer_ready", "train_step", "weights_synced", "trainer_dropped"]


def test_the_cache_may_be_offloaded_and_its_memory_used_by_others():
    order([*OFFLOADED, "trainer_ready", "trainer_dropped", "kv_cache_restored", "rollout_resumed"])


@pytest.mark.parametrize("changed", [SYNCED, ["streamed"]])
def test_other_weights_leave_the_requests_in_flight_and_the_resume_says_that_they_are_others(
    changed,
):
    names = [*OFFLOADED, *changed, "kv_cache_restored", "rollout_resumed"]
    given = (
        {"streamed": {"use": "weights_streamed", "probe_tokens": 0}} if "streamed" in names else {}
    )
    by = "streamed" if given else "weights_synced"
    assert refusal(names, **given) == (
        "pipeline: step 'rollout_resumed' requires requests in flight whose first tokens other weights "
        f"made to be absent, but step '{by}' created it; set new_weights=true for this step, and each "
        "sample says which weights made which tokens"
    )
    under_new = given | {"rollout_resumed": {"new_weights": True}}
    assert order(names, **under_new)
    # The cache has what both have computed.
    assert refusal([*names, "generate"], **under_new).endswith(
        "flush the cache between the swap and the generate, or the ids are silently wrong"
    )
    assert order([*names, "flush_cache", "generate"], **under_new)


def test_new_weights_are_refused_where_there_are_none():
    assert refusal([*PAUSED, "rollout_resumed"], rollout_resumed={"new_weights": True}) == (
        "pipeline: step 'rollout_resumed' needs requests in flight whose first tokens other weights "
        "made, but no step before it provides it; put a swap or a sync between the pause and it, or "
        "leave out new_weights"
    )


def test_a_resumed_rollout_is_one_that_others_may_be_compared_with():
    names = [*PAUSED, "rollout_resumed", "flush_cache", "rollout"]
    assert order(names, rollout={"same_rollout_as": "rollout_resumed"})


CHECKED = [*OFFLOADED, *SYNCED, "kv_cache_restored", "rollout_resumed", "trainer", "checked"]
OF_RESUMED = {"use": "policy_checked", "of": "rollout_resumed"}
TRAINER = {"use": "trainer_ready"}


def test_tokens_of_new_weights_are_compared_with_the_policy_only_if_they_alone_computed_them():
    resumed = {"new_weights": True, "recompute": True}
    options = {"trainer": TRAINER, "checked": OF_RESUMED}
    assert order(CHECKED, rollout_resumed=resumed, **options)
    assert refusal(CHECKED, rollout_resumed=resumed | {"recompute": False}, **options) == (
        "pipeline: step 'checked' requires tokens of step 'rollout_resumed' that follow upon what other "
        "weights have computed to be absent, but step 'rollout_resumed' created it; set recompute=true "
        "for step 'rollout_resumed'"
    )


def test_the_tokens_of_a_paused_rollout_are_compared_before_other_weights_come():
    of_paused = {"use": "policy_checked", "of": None}
    assert order([*OFFLOADED, "trainer", "checked"], trainer=TRAINER, checked=of_paused)
    late = [*OFFLOADED, *SYNCED, "trainer", "checked"]
    assert refusal(late, trainer=TRAINER, checked=of_paused).startswith(
        "pipeline: step 'checked' requires requests in flight whose first tokens other weights made to "
        "be absent, but step 'weights_synced' created it"
    )


def test_a_cache_that_is_computed_again_is_not_stale_and_the_same_weights_need_no_recompute():
    names = [*OFFLOADED, *SYNCED, "kv_cache_restored", "rollout_resumed", "generate"]
    assert order(names, rollout_resumed={"new_weights": True, "recompute": True})
    assert refusal([*PAUSED, "rollout_resumed"], rollout_resumed={"recompute": True}) == (
        "phases.rollout_resumed.recompute is true, but new_weights is false: the same weights would "
        "compute the same again; leave recompute out, or set new_weights=true"
    )
