"""Use of the plan by the worker before the first step runs."""

import pytest

from kvpipe.plan.fold import PlannedStep, check_order
from kvpipe.records.run import PlannedPhase
from tests.helpers_config import build


def started(name: str) -> PlannedStep:
    *_, last = check_order(build(["jax_ready", name]))
    return last


@pytest.mark.parametrize(
    ("name", "checked"), [("engine_ready_dummy", 0), ("engine_ready_empty", 1700)]
)
def test_a_start_with_random_weights_whose_random_bits_may_be_sampled_is_not_held_to_its_peak(
    four_devices: None, name: str, checked: int
) -> None:
    from kvpipe.worker.work import checked_peak

    phase = PlannedPhase("ready", {"params": 1600}, 1600, 1600, peak_device_bytes=1700)
    assert checked_peak(started(name).step, phase) == checked
