"""What a worker makes of its plan before the first step runs."""

import pytest

from kvpipe.plan.fold import PlannedStep, check_order
from kvpipe.records.run import PlannedPhase
from tests.helpers_config import build


def started(name: str) -> PlannedStep:
    *_, last = check_order(build(["jax_ready", name]))
    return last


def phase(after: int, peak: int) -> PlannedPhase:
    return PlannedPhase("ready", {"params": after}, after, after, peak_device_bytes=peak)


@pytest.mark.parametrize(
    ("name", "after", "peak", "checked"),
    [
        ("engine_ready_dummy", 1600, 1700, 1700),
        ("engine_ready_dummy", 1600, 1699, 0),
        ("engine_ready_dummy", 1600, 1600, 0),
        ("engine_ready_empty", 1600, 1600, 1600),
    ],
)
def test_a_start_whose_peak_its_garbage_could_reach_is_not_checked_for_it(
    four_devices: None, name: str, after: int, peak: int, checked: int
) -> None:
    """A KV cache that is larger than the parameters: the most bytes are there after the start."""
    from kvpipe.worker.work import checked_peak

    assert checked_peak(started(name), phase(after, peak)) == checked
