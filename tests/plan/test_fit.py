"""What a plan leaves out, and the warning of one that fits by a hair."""

from dataclasses import replace

import pytest

from kvpipe.plan.fit import warning
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
    told = warning(plan(V5E - (123 << 20), temp_bytes=60 << 20, programs=programs))
    assert told is not None
    assert told.endswith("the engine's small programs and the runtime's own memory are left out")


def test_on_a_cpu_the_margin_is_a_copy_of_the_kv_cache() -> None:
    assert warning(plan(V5E - GIB, "cpu")) is None
    assert warning(plan(V5E - GIB + 1, "cpu")) == (
        "only 1,073,741,823 bytes of a device stay free, less than 1,073,741,824: attention on a "
        "CPU copies the KV cache"
    )
