"""Every experiment of this machine on devices that count their bytes, and pad, as a TPU does."""

from pathlib import Path

import pytest

from kvpipe.pipeline.ledger import PADDING, PROGRAM
from tests import rehearsal
from tests.helpers_config import EXPERIMENTS, compose_plain, config_of

pytestmark = pytest.mark.slow

TINY = [name for name in EXPERIMENTS if name.startswith("tiny")]
# Each vector of a float32 engine fills a tile, where one of bfloat16 is padded; a trainer pads too.
WHOLE_TILES = ("tiny_rollout", "tiny_rollout_paused")


@pytest.mark.nightly(finds="bytes that a check compares without their padding, or with code")
@pytest.mark.parametrize("experiment", TINY)
def test_an_experiment_holds_its_plan_to_the_byte_where_the_devices_pad_and_count(
    tmp_path: Path, experiment: str
) -> None:
    done = rehearsal.run(tmp_path, experiment)
    assert done.error is None
    planned = {phase.name: phase.pools for phase in done.plan.phases}
    steps = [record for record in done.records if planned[record.phase]]
    for record in steps:
        used = record.memory.jax_device_memory_summary["bytes_in_use_sum"]
        assert sum(record.ledger.values()) == used
        assert planned[record.phase].get(PADDING, 0) <= record.ledger[PADDING]
        assert record.ledger[PROGRAM] > 0
    assert any(PADDING in pools for pools in planned.values()) == (experiment not in WHOLE_TILES)
    stated = config_of(compose_plain(f"+experiment={experiment}")).plan.limit_bytes
    assert done.plan.fit.hbm_bytes == (stated or rehearsal.LIMIT_BYTES)
    assert steps[-1].memory.jax_device_memory_summary["bytes_reserved_sum"] == 4 << 20
