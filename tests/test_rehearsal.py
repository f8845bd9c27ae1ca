"""Every experiment of this machine on devices that count their bytes, and pad, as a TPU does."""

from pathlib import Path

import pytest

from kvpipe.pipeline.ledger import PADDING, PROGRAM
from tests import rehearsal, test_grpo, test_sft
from tests.conftest import ONE_LAYER, SIZES, SMALL_PAUSE
from tests.helpers_config import EXPERIMENTS, compose_plain, config_of

pytestmark = pytest.mark.slow

TINY = [name for name in EXPERIMENTS if name.startswith("tiny")]
# Each vector of a float32 engine fills a tile, where one of bfloat16 is padded; a trainer pads too.
WHOLE_TILES = ("tiny_rollout", "tiny_rollout_paused")
# Arrays of one layer are padded as those of three. Three cycles are one after the last new program.
FEW: dict[str, tuple[str, ...]] = dict.fromkeys(TINY, (ONE_LAYER,))
FEW |= {
    # Here the trainer fits beside a smaller cache; with the experiment's own limit all could stay.
    "tiny_kv_auto": (ONE_LAYER, "plan.limit_bytes=16000000"),
    "tiny_rollout_paused": (
        *(ONE_LAYER, "prompts.limit=8"),
        "phases.rollout_paused.pause_after_tokens=275",
    ),
}
# On two devices, and of the sizes with which a test runs the same: its programs are compiled.
AS_IN_A_TEST: dict[str, tuple[str, ...]] = {
    "tiny_async_cycle": (*SIZES, ONE_LAYER, *SMALL_PAUSE),
    "tiny_grpo": (*test_grpo.SHORT, "repeat.times=3"),
    "tiny_rl_cycle": (*SIZES, ONE_LAYER, "repeat.times=3", "sampling.max_new_tokens=8"),
    "tiny_rollout": (*SIZES, ONE_LAYER, "engine.max_running_requests=16", "prompts.limit=4"),
    "tiny_sft": test_sft.SHORT,
}


@pytest.mark.nightly(finds="bytes that a check compares without their padding, or with code")
@pytest.mark.parametrize("experiment", TINY)
def test_an_experiment_holds_its_plan_to_the_byte_where_the_devices_pad_and_count(
    tmp_path: Path, experiment: str
) -> None:
    devices = 2 if experiment in AS_IN_A_TEST else 4
    options = AS_IN_A_TEST.get(experiment, FEW[experiment])
    done = rehearsal.run(tmp_path, experiment, *options, devices=devices)
    assert done.error is None
    planned = {phase.name: phase.pools for phase in done.plan.phases}
    steps = [record for record in done.records if planned[record.phase]]
    for record in steps:
        used = record.memory.jax_device_memory_summary["bytes_in_use_sum"]
        assert sum(record.ledger.values()) == used
        assert planned[record.phase].get(PADDING, 0) <= record.ledger[PADDING]
        assert record.ledger[PROGRAM] > 0
    assert any(PADDING in pools for pools in planned.values()) == (experiment not in WHOLE_TILES)
    chosen = [each.action for each in done.plan.kv_actions or () if each.chosen]
    assert chosen == ["shrink"] * (experiment == "tiny_kv_auto")
    stated = config_of(compose_plain(f"+experiment={experiment}", *options)).plan.limit_bytes
    assert done.plan.fit.hbm_bytes == (stated or rehearsal.LIMIT_BYTES)
    assert steps[-1].memory.jax_device_memory_summary["bytes_reserved_sum"] == devices << 20
