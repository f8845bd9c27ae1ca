"""A run that SIGKILL ends somewhere in a cycle, and is resumed: its weights are those of any other."""

import pytest

from kvpipe.report.run import read_run
from tests import preempted
from tests.command import Finished, kvpipe
from tests.conftest import ONE_LAYER, SIZES

OPTIONS = (
    "+experiment=tiny_rl_cycle",
    *SIZES,
    "engine.tp_size=2",
    ONE_LAYER,
    "repeat.times=3",
    "trainer.checkpoint_every=1",
)
PLACES = {
    "before the rollout": ("generate_rollout", "repeat.first=preempted"),
    "before the training": ("train_step_kv_kept",),
    "before the sync": ("weights_synced",),
    "before the offload": ("trainer_offloaded",),
    "in the save": ("trainer_offloaded", "phases.preempted.in_a_save=true"),
}
# However fast they are compiled, all stay for the next run.
ALL_PROGRAMS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly(finds="a place of the cycle after which a resumed run trains otherwise"),
]


def trained(records) -> dict[str, dict]:
    """Return by step what says which training it was."""
    keys = ("weights_digest", "gradient_norm", "token_ids", "trained_steps")
    found = {name: {key: fields[key] for key in keys if key in fields} for name, fields in records}
    return {name: fields for name, fields in found.items() if "preempted" not in name and fields}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Finished:
    done = kvpipe(tmp_path_factory.mktemp("whole"), *OPTIONS, "tracking=disabled")
    assert done.exit_code == 0, done.end["error"]
    return done


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(place, uninterrupted, tmp_path):
    before, *more = PLACES[place]
    command = (
        *OPTIONS,
        preempted.write(tmp_path),
        f"pipeline_edit.before.{before}=preempted",
        "phases.preempted.signum=9",
        *more,
        "tracking=offline",
        "hydra.run.dir=killed",
    )
    assert kvpipe(tmp_path, *command, **ALL_PROGRAMS).exit_code == -9
    run = read_run(tmp_path / "killed")
    assert run.status == "unfinished"
    (first_id,) = [p.fields["id"] for p in run.phases if p.phase == "wandb_init"]
    resumed = kvpipe(tmp_path, *command, "resume=true", **ALL_PROGRAMS)
    assert (resumed.exit_code, resumed.end["error"]) == (0, None)
    assert resumed.phase("wandb_init")["id"] == first_id
    steps = [line for line in resumed.lines if "programs_loaded" in line]
    assert sum(line["programs_loaded"] for line in steps) > 0
    assert {line["phase"]: line["compilations"] for line in steps if line["compilations"]} == {}
    whole = read_run(tmp_path / "killed")
    expected = trained((line["phase"], line) for line in uninterrupted.lines if "use" in line)
    found = trained((phase.phase, phase.fields) for phase in whole.phases)
    assert {step: found[step] for step in expected} == expected
