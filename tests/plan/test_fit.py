"""The omissions that a plan states, and the warning of one that barely fits."""

from dataclasses import replace

import pytest

from kvpipe.config.schema import TrainerConfig
from kvpipe.plan.fit import KvCapacity, left_out, most_rows, warning, why_not_fit
from kvpipe.records.run import Fit, PlannedPhase, Program, RunPlanned

GIB = 1 << 30
V5E = 16 * GIB


def plan(peak: int, target: str = "v5e:2x2x1", temp_bytes: int = 0, **more) -> RunPlanned:
    phases = (
        PlannedPhase("ready", {"params": 2 * GIB, "kv": 4 * GIB}, 6 * GIB, 6 * GIB // 4),
        PlannedPhase("full", {"params": 4 * peak}, 4 * peak, peak),
    )
    fit = Fit(peak + temp_bytes <= V5E, V5E, "full", 64, temp_bytes)
    return replace(RunPlanned(target, 4, "0.0.2", phases, fit), **more)


def test_a_plan_that_leaves_too_little_for_code_and_temporaries_warns() -> None:
    """It said "It fits: 17,175,629,824 of 17,179,869,184 bytes", without those 155 MB."""
    assert warning(plan(17_175_629_824)) == (
        "only 4,239,360 bytes of a device stay free, less than 268,435,456: compiled code, "
        "temporaries and the runtime's own memory are left out"
    )


def test_what_stays_free_is_that_of_the_step_with_the_peak_and_not_of_two_steps_together() -> None:
    """A step without temporaries may hold more after it than the one that needs most while it runs."""
    full = plan(8 * GIB, temp_bytes=5 * GIB, programs=(Program("decode", 1, 1, 0, 5 * GIB, 1.0),))
    larger = PlannedPhase("two_sets", {"params": 44 * GIB}, 44 * GIB, 11 * GIB)
    both = replace(full, phases=(*full.phases, larger))
    assert warning(both) is None


@pytest.mark.parametrize(
    ("peak", "warned"),
    [(V5E - (256 << 20), False), (V5E - (256 << 20) + 1, True), (V5E, True), (V5E + 1, False)],
)
def test_the_margin_is_exact_and_what_does_not_fit_is_no_warning(peak: int, warned: bool) -> None:
    assert (warning(plan(peak)) is not None) == warned


def test_with_compiled_steps_the_margin_is_smaller_and_their_temporaries_count() -> None:
    programs = (Program("decode", 1, 1, 50, 60 << 20, 1.0),)
    assert warning(plan(V5E - (124 << 20), temp_bytes=60 << 20, programs=programs)) is None
    reported = warning(plan(V5E - (123 << 20), temp_bytes=60 << 20, programs=programs))
    assert reported is not None
    assert reported.endswith(
        "the engine's small programs and the runtime's own memory are left out"
    )


def test_on_a_cpu_the_margin_is_a_copy_of_the_kv_cache() -> None:
    assert warning(plan(V5E - GIB, "cpu")) is None
    assert warning(plan(V5E - GIB + 1, "cpu")) == (
        "only 1,073,741,823 bytes of a device stay free, less than 1,073,741,824: attention on a "
        "CPU copies the KV cache"
    )


def test_on_a_cpu_compiled_temporaries_take_the_place_of_the_copy_of_the_kv_cache() -> None:
    programs = (Program("prefill", 4, 64, 0, GIB, 1.0),)
    assert warning(plan(V5E - 2 * GIB, "cpu", temp_bytes=GIB, programs=programs)) is None


def test_the_message_of_a_plan_that_does_not_fit_has_temporaries_and_reserve() -> None:
    full = plan(V5E - GIB, temp_bytes=GIB)
    assert why_not_fit(full) is None
    reserved = replace(full, fit=replace(full.fit, fits=False, reserve_bytes=128))
    assert why_not_fit(reserved) == (
        "the plan does not fit: step 'full' needs 17179869184 bytes on a device, 1073741824 of them "
        "for temporaries, which has 17179869184 less 128 for fragmentation (plan.reserve_bytes); "
        "engine.max_total_tokens=64 would fit"
    )
    none = replace(reserved, fit=replace(reserved.fit, max_total_tokens=0))
    why = why_not_fit(none)
    assert why
    assert why.endswith(
        "; no KV cache would fit beside so many; plan a smaller one, whose temporaries may be smaller"
    )


def test_a_plan_without_libtpu_says_that_the_padding_is_left_out() -> None:
    assert "padding of small arrays (libtpu" in left_out(plan(GIB, padded=False))


@pytest.mark.parametrize("room", range(0, 40_000, 999))
def test_the_largest_capacity_of_a_padded_cache_is_exact(room: int) -> None:
    """A TPU pads the rows of a layer with 3 heads to a multiple of 8."""

    def padded(tokens: int) -> int:
        return -(-(tokens + 2) // 8) * 8 * 768

    kv = KvCapacity(12 * 768, 10, 2, padded_bytes=padded)
    most = kv.most_in(room)
    assert most == max((t for t in range(0, 100, 2) if padded(t) <= room), default=0)


@pytest.mark.parametrize(("most", "found"), [(0, 0), (1, 1), (5, 4), (12, 12)])
def test_the_largest_micro_batch_divides_the_batch_and_few_are_asked_for(most, found):
    asked = []

    def fits(rows):
        asked.append(rows)
        return rows <= most

    assert most_rows(TrainerConfig(loss="sft", batch_size=12), fits) == found
    assert len(asked) <= 3
    assert set(asked) <= {1, 2, 3, 4, 6, 12}
