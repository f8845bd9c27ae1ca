"""Supervised training on the real engine: a run of the experiment, in the tiny model of one layer."""

import shlex
from types import SimpleNamespace

import pytest

from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fold import check_order
from kvpipe.plan.inputs import check_inputs
from kvpipe.report.run import read_run
from tests import preempted
from tests.command import Finished, kvpipe, programs
from tests.conftest import ONE_LAYER, SIZES
from tests.helpers_config import build, compose_plain, config_of
from tests.refusal import refusal

SHORT = (
    *SIZES,
    "engine.tp_size=2",
    "repeat.times=3",
    ONE_LAYER,
    "trainer.batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.length=64",  # the gradients then need more than the update
    "trainer.warmup_steps=1",
    "+phases.loss_fell.share=0.9",
)
# In the first tier tests/test_paused_rollout.py trains so on an engine, and tests/test_grpo.py checks
# the numbers of a step.
SHORTLY = pytest.mark.nightly(
    finds="temporaries of a step that are not the planned ones, or an engine that has learnt nothing"
)
WHOLE = pytest.mark.nightly(finds="training that lowers the loss, but not to what was asked for")


def training(run: Finished) -> list[dict]:
    """Return the records of a run's training steps."""
    return [line for line in run.lines if "train_step" in line and "duration_s" in line]


OF_SHORT = pytest.param(SHORT, marks=SHORTLY, id="short")
OF_WHOLE = pytest.param((), marks=WHOLE, id="whole")


@pytest.fixture(scope="module", params=[OF_SHORT, OF_WHOLE])
def options(request):
    return ("+experiment=tiny_sft", "plan.compile=true", *request.param)


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    done = kvpipe(tmp_path_factory.mktemp("sft"), *options, "tracking=disabled")
    assert done.exit_code == 0, done.end["error"]
    return done


@pytest.fixture(scope="module")
def parts(options, tmp_path_factory):
    """The same run, ended by SIGTERM in its second cycle, and resumed by the command that it names."""
    cwd = tmp_path_factory.mktemp("preempted")
    own = (preempted.write(cwd), "pipeline_edit.before.train_step=preempted")
    saving = ("repeat.first=preempted", "trainer.checkpoint_every=100", "tracking=offline")
    first = kvpipe(cwd, *options, *own, *saving)
    command = first.end["error"].partition("to go on after it: ")[2]
    _, _, _, *arguments = shlex.split(command)
    return first, kvpipe(cwd, *arguments, "trainer.checkpoint_every=1")


@pytest.mark.slow
@pytest.mark.nightly(
    finds="a run that saves its trainer and goes on otherwise than without the signal"
)
@pytest.mark.parametrize("options", [OF_SHORT], indirect=True)
def test_a_run_that_sigterm_ended_goes_on_as_if_it_had_not(run, parts):
    """The trainer of the first cycle was saved because of the signal, and for nothing else."""
    first, resumed = parts
    assert (first.exit_code, first.end["status"]) == (143, "interrupted")
    steps = [line["phase"] for line in first.lines]
    assert steps[-4:] == ["train_step", "preempted#2", "trainer_saved", "run_finished"]
    assert (resumed.exit_code, resumed.end["error"]) == (0, None)
    assert resumed.run_dir == first.run_dir

    ids = [part.phase("wandb_init")["id"] for part in parts]
    assert ids[0] == ids[1] and ids[0] is not None
    whole = {phase.phase: phase for phase in read_run(first.run_dir).phases}
    own = [step for step in whole if step.startswith(("preempted", "trainer_saved"))]
    uninterrupted = [line["phase"] for line in run.lines if "duration_s" in line]
    assert [step for step in whole if step not in own] == uninterrupted
    losses = {line["phase"]: line["loss"] for line in training(run)}
    assert {step: whole[step].fields["loss"] for step in losses} == losses
    digest = run.phase("weights_synced")["weights_digest"]
    assert whole["weights_synced"].fields["weights_digest"] == digest
    assert (
        whole["generate_trained"].fields["token_ids"] == run.phase("generate_trained")["token_ids"]
    )


@pytest.mark.slow
def test_the_engine_answers_with_what_the_trainer_learnt(run):
    """The checks of the run say the rest: bytes as planned, no array too many, another output."""
    checks = {check["name"]: check for check in run.end["checks"]}
    fell = checks["loss_fell"]
    first, *_, last = (record["loss"] for record in training(run))
    assert fell["actual"] == last <= fell["expected"] < first
    assert checks["different_output"]["passed"]


@pytest.mark.slow
def test_a_training_step_has_its_numbers_takes_no_byte_more_and_compiles_once(run):
    first, *later = training(run)
    assert {record["gradients"] for record in (first, *later)} == {"sft"}
    assert programs(first) > 0
    assert {programs(record) for record in later} == {0}
    assert all(record["ledger"] == first["ledger"] for record in later)
    for record in (first, *later):
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["compute_s"])
        assert min(record["gradient_norm"], record["entropy"], record["learning_rate"]) > 0


@pytest.mark.slow
def test_the_plan_has_the_temporaries_that_the_step_takes(run):
    """Also as a row of the step and in what must fit; each step checks it by itself."""
    planned = run.phase("run_planned")
    programs = {program["name"]: program for program in planned["programs"]}
    held = [programs[name]["temp_bytes"] for name in ("gradients", "train_step")]
    assert min(held) > 0
    temp_bytes = max(held)
    rows = {phase["name"]: phase["temp_bytes"] for phase in planned["phases"]}
    for record in training(run):
        assert rows[record["phase"]] == temp_bytes
        assert record["step_memory"]["temp_bytes"] == planned["devices"] * temp_bytes
        (check,) = (each for each in record["checks"] if each["name"] == "step_temporaries")
        assert (check["expected"], check["actual"]) == (temp_bytes, temp_bytes)


def test_a_pipeline_that_reads_losses_of_seeded_gradients_is_refused_before_it_is_run():
    config = config_of(compose_plain("+experiment=tiny_sft", "trainer.loss=seeded"))
    planned = check_order(build_steps(config))
    assert refusal(check_inputs, config, planned, whole=False) == (
        "trainer.loss is 'seeded', which has no loss, but step 'loss_fell' reads losses; leave the "
        "step out, or set trainer.loss=sft"
    )


@pytest.mark.parametrize(("losses", "passes"), [([8.0, 9.0, 0.8], True), ([8.0, 0.1, 0.9], False)])
def test_the_last_loss_is_held_against_the_first(losses, passes):
    (step,) = build(["loss_fell"], loss_fell={"share": 0.1})
    context = SimpleNamespace(trainer=SimpleNamespace(losses=losses))
    (check,) = step.run(context).checks
    assert (check.name, check.passed) == ("loss_fell", passes)
