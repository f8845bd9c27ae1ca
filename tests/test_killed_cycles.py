"""A run that SIGKILL ends all over a cycle, resumed each time: its weights are those of any other."""

import pytest

from kvpipe.report.run import Run, read_run
from tests import preempted
from tests.command import Finished, kvpipe
from tests.conftest import ONE_LAYER, SIZES

OPTIONS = (
    "+experiment=tiny_rl_cycle",
    *SIZES,
    "engine.tp_size=2",
    ONE_LAYER,
    "repeat.times=3",
    "sampling.max_new_tokens=8",
    "trainer.checkpoint_every=1",
)
# In the order of a cycle: each resumed run passes the places before it and ends at the next one. Once
# the second cycle is saved it may be over, so that place is the last.
PLACES = {
    "killed_before_rollout": "generate_rollout",
    "killed_before_training": "train_step_kv_kept",
    "killed_before_sync": "weights_synced",
    "killed_before_offload": "trainer_offloaded",
    "killed_in_save": "trainer_offloaded",
}
# However fast they are compiled, all stay for the next run.
ALL_PROGRAMS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly(finds="a place of the cycle after which a resumed run trains otherwise"),
]


def killed_in_all_places() -> list[str]:
    """Return the overrides that put a step of :mod:`tests.preempted` into each place."""
    overrides = ["repeat.first=killed_before_rollout"]
    for before in dict.fromkeys(PLACES.values()):
        steps = ",".join(step for step in PLACES if PLACES[step] == before)
        overrides.append(f"pipeline_edit.before.{before}=[{steps}]")
    for step in PLACES:
        in_a_save = str(step == "killed_in_save").lower()
        overrides.append(f"phases.{step}={{use: preempted, signum: 9, in_a_save: {in_a_save}}}")
    return overrides


def trained(records) -> dict[str, dict]:
    """Return by step what says which training it was."""
    keys = ("weights_digest", "gradient_norm", "token_ids", "trained_steps")
    found = {name: {key: fields[key] for key in keys if key in fields} for name, fields in records}
    return {name: fields for name, fields in found.items() if name not in PLACES and fields}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Finished:
    done = kvpipe(tmp_path_factory.mktemp("whole"), *OPTIONS, "tracking=disabled")
    assert done.exit_code == 0, done.end["error"]
    return done


def wandb_id(run: Run) -> str:
    (first_id,) = {p.fields["id"] for p in run.phases if p.phase == "wandb_init"}
    return first_id


def test_a_killed_run_goes_on_as_if_it_had_not_been(uninterrupted, tmp_path):
    command = (
        *OPTIONS,
        preempted.write(tmp_path),
        *killed_in_all_places(),
        "tracking=offline",
        "hydra.run.dir=killed",
    )
    ids = set()
    for number, place in enumerate(PLACES):
        resume = ("resume=true",) if number else ()
        killed = kvpipe(tmp_path, *command, *resume, **ALL_PROGRAMS)
        assert killed.exit_code == -9, place
        passed = {path.name for path in tmp_path.rglob("killed_*#2")}
        assert passed == {f"{step}#2" for step in list(PLACES)[: number + 1]}
        run = read_run(tmp_path / "killed")
        assert run.status == "unfinished", place
        ids.add(wandb_id(run))
    resumed = kvpipe(tmp_path, *command, "resume=true", **ALL_PROGRAMS)
    assert (resumed.exit_code, resumed.end["error"]) == (0, None)
    assert ids == {resumed.phase("wandb_init")["id"]}
    steps = [line for line in resumed.lines if "programs_loaded" in line]
    assert sum(line["programs_loaded"] for line in steps) > 0
    assert {line["phase"]: line["compilations"] for line in steps if line["compilations"]} == {}
    whole = read_run(tmp_path / "killed")
    expected = trained((line["phase"], line) for line in uninterrupted.lines if "use" in line)
    found = trained((phase.phase, phase.fields) for phase in whole.phases)
    assert {step: found[step] for step in expected} == expected
