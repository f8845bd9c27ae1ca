"""Requirements of a run that saves its trainer, refusals of a checkpoint, and the effect of a signal."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kvpipe.checkpoints import resumable
from kvpipe.config.training_inputs import as_plain, digests
from kvpipe.errors import Ending, Interrupted
from kvpipe.parent import resumption
from kvpipe.parent.preemption import Preemption
from kvpipe.plan.continuation import planned_steps
from kvpipe.records.run import Check, PhaseRecord
from kvpipe.system.process_memory import process_memory
from tests.helpers_config import compose_plain, config_of
from tests.refusal import refusal
from tests.sinks.pipeline_records import passed, started

SAVING = ("+experiment=tiny_sft", "repeat.times=3", "trainer.checkpoint_every=1")


def plain_of(*overrides: str, resume: bool = True) -> dict[str, Any]:
    return compose_plain(*SAVING, *overrides) | {"resume": resume}


def about_of(plain: dict[str, Any]) -> resumable.About:
    config = config_of(plain)
    return resumable.About(
        format=resumable.FORMAT,
        cycle=2,
        steps=2,
        losses=[3.5, 2.5],
        outputs={},
        config=as_plain(config),
        files=digests(config),
        versions={"jax": "0.0.1"},
        tracking_id="abcd1234",
        devices=2,
        arrays={},
        nbytes=100,
    )


def write(run_dir: Path, about: resumable.About, cycle: int = 2) -> Path:
    """Write the files of a checkpoint that its description needs."""
    path = resumable.path_of(run_dir / resumable.CHECKPOINTS_DIR, cycle)
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes(100))
    (path / "about").mkdir()
    (path / "about/metadata").write_text(json.dumps(asdict(about)))
    return path


def completed(run_dir: Path, *overrides: str) -> dict[str, Any]:
    return resumption.completed(plain_of(*overrides), run_dir)


def test_a_run_that_saves_gets_a_place_for_it_and_an_id_for_wandb(tmp_path):
    plain = resumption.completed(plain_of(resume=False), tmp_path)
    assert plain["trainer"]["checkpoint_dir"] == str(tmp_path / "checkpoints")
    assert re.fullmatch("[a-z0-9]{8}", plain["tracking"]["id"])
    assert plain["resume_after"] is None
    off = resumption.completed(plain_of("tracking=disabled", resume=False), tmp_path)
    assert off["tracking"]["id"] is None
    neither = compose_plain()
    assert resumption.completed(neither, tmp_path) == neither


def test_a_resumed_run_goes_on_after_the_last_checkpoint_under_the_same_id_of_wandb(tmp_path):
    about = about_of(plain_of(resume=False))
    write(tmp_path, replace(about, cycle=1, tracking_id="another"), cycle=1)
    write(tmp_path, about)
    (tmp_path / "checkpoints/cycle-3.orbax-checkpoint-tmp").mkdir()
    plain = completed(tmp_path)
    assert (plain["resume_after"], plain["tracking"]["id"]) == (2, "abcd1234")


def test_what_differs_without_an_effect_is_reported_and_so_are_the_steps_that_are_skipped(tmp_path):
    path = write(tmp_path, about_of(plain_of(resume=False)))
    config = config_of(completed(tmp_path, "runner.heartbeat_s=7", "repeat.times=5"))
    skipped, differs, versions = resumption.messages(config, planned_steps(config))
    assert skipped == (
        f"resumes after cycle 2, from {path}: 4 steps of the cycles before are skipped "
        "(train_step … trainer_saved#2)"
    )
    assert differs == (
        "no weight or loss depends on what differs from then: repeat.times is 5, it was 3; "
        f"runner.heartbeat_s is 7.0, it was 30.0; trainer.checkpoint_dir is {json.dumps(str(path.parent))}, "
        "it was null"
    )
    assert re.fullmatch('versions differ .*: jax is "[^"]+", it was "0.0.1"', versions)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.generate.hidden_size=256", "model.generate.hidden_size is 256, it was 512"),
        ("trainer.dtype=bfloat16", 'trainer.dtype is "bfloat16", it was "float32"'),
        ("engine.tp_size=1", "engine.tp_size is 1, it was 2"),
        ("trainer.learning_rate=0.5", "trainer.learning_rate is 0.5, it was 0.0003"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_with_the_key_and_both_values(
    tmp_path, override, message
):
    path = write(tmp_path, about_of(plain_of(resume=False)))
    assert refusal(completed, tmp_path, override) == (
        f"resume: the training of {path} was another one: {message}; set it back, or start a new run"
    )


def test_a_checkpoint_of_other_examples_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    path = write(tmp_path, about_of(plain_of(f"trainer.data={data}", resume=False)))
    data.write_text('{"prompt": "a", "response": "c"}\n')
    message = refusal(completed, tmp_path, f"trainer.data={data}")
    assert re.fullmatch(
        f"resume: trainer.data is not what it was for {path}: its SHA-256 is [0-9a-f]{{12}}, it was "
        "[0-9a-f]{12}",
        message,
    )


def test_a_checkpoint_that_is_not_whole_or_of_a_later_version_is_refused(tmp_path):
    about = about_of(plain_of(resume=False))
    path = write(tmp_path, replace(about, format=2))
    assert refusal(completed, tmp_path) == (
        f"resume: {path} has format 2, and this kvpipe reads 1; resume with the version of kvpipe that "
        "wrote it"
    )
    (path / "about/metadata").write_text(json.dumps(asdict(replace(about, nbytes=10**6))))
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert refusal(completed, tmp_path) == (
        f"resume: the checkpoint {path} is not whole: it has {there:,} bytes, and its arrays alone "
        "1,000,000"
    )
    (path / "about/metadata").write_text('{"format": 1,')
    assert f"the checkpoint {path} is not whole: " in refusal(completed, tmp_path)
    (path / "state/manifest.ocdbt").unlink()
    assert refusal(completed, tmp_path) == (
        f"resume: the checkpoint {path} is not whole: it has no state/manifest.ocdbt"
    )


def test_another_number_of_devices_is_refused_once_the_worker_knows_it(tmp_path):
    path = write(tmp_path, about_of(plain_of(resume=False)))
    config = config_of(completed(tmp_path))
    resumable.check_devices(config, 2)
    assert refusal(resumable.check_devices, config, 4) == (
        f"resume: {path} was made on 2 devices, and there are 4 here"
    )


def test_without_a_checkpoint_and_after_the_end_there_is_nothing_to_resume(tmp_path):
    assert refusal(completed, tmp_path) == (
        f"resume: there is no checkpoint in {tmp_path / 'checkpoints'}; name the run's directory with "
        "hydra.run.dir, or leave resume out to start from the beginning"
    )
    write(tmp_path, about_of(plain_of(resume=False)))
    lines = [record.line for record in (started(), passed())]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert refusal(completed, tmp_path) == (
        f"resume: the run in {tmp_path} has finished; there is nothing to resume"
    )
    plain = plain_of(resume=False) | {"resume_after": 2}
    assert refusal(resumption.completed, plain, tmp_path) == (
        "resume_after: resume=true sets it; leave it out"
    )


def test_a_run_that_starts_anew_loses_an_earlier_checkpoint_only_if_asked_to(tmp_path):
    path = write(tmp_path, about_of(plain_of(resume=False)))
    anew = resumption.completed(plain_of(resume=False), tmp_path)
    assert refusal(resumption.begin_anew, config_of(anew), False) == (
        f"trainer.checkpoint_dir: {path} is of an earlier run; resume=true continues that run, "
        "runner.overwrite=true loses it"
    )
    resumption.begin_anew(config_of(completed(tmp_path)), True)
    (path.parent / "cycle-2-of-mine").mkdir()
    resumption.begin_anew(config_of(anew), True)
    assert [left.name for left in path.parent.iterdir()] == ["cycle-2-of-mine"]


def test_a_trainer_of_several_hosts_is_not_saved():
    from kvpipe.config.hosts import check_hosts

    plain = compose_plain(*SAVING, "engine.nnodes=2", "engine.dist_init_addr=10.0.0.2:8476")
    assert refusal(check_hosts, config_of(plain)) == (
        "trainer.checkpoint_every is 1, but engine.nnodes is 2: a trainer is saved on one host only"
    )


def record(step: str, *checks: Check) -> PhaseRecord:
    return PhaseRecord(step, step, 0, 0.0, 0.0, process_memory(), checks=checks)


def test_a_signal_waits_for_a_step_only_while_a_cycle_is_not_saved(tmp_path):
    preemption = Preemption(config_of(plain_of(resume=False)))
    signal = Interrupted(15)
    preemption.passed(record("trainer_ready"))
    assert not preemption.takes(signal)
    preemption.passed(record("train_step"))
    preemption.passed(record("trainer_saved"))
    assert not preemption.takes(signal)
    preemption.passed(record("train_step#2", Check("a check", 1, 2, False)))
    assert not preemption.takes(signal)
    preemption.passed(record("train_step#2"))
    assert preemption.takes(signal)
    assert preemption.ending(Ending()) == Ending()
    preemption.obeyed = True
    assert preemption.ending(Ending()).exit_code == 143
    assert preemption.ending(Ending(3, "no disk")).error == "SIGTERM ended the run; then: no disk"
    assert not Preemption(config_of(compose_plain("+experiment=tiny_sft"))).takes(signal)


def test_an_ending_says_how_to_go_on_if_there_is_a_checkpoint(tmp_path):
    config = config_of(resumption.completed(plain_of(resume=False), tmp_path))
    ended = Ending(143, "SIGTERM ended the run")
    assert Preemption(config).with_hint(ended, "the command") == ended
    path = write(tmp_path, about_of(plain_of(resume=False)))
    assert Preemption(config).with_hint(ended, "the command").error == (
        f"SIGTERM ended the run; {path} is saved; to go on after it: the command"
    )
    assert Preemption(config).with_hint(Ending(), "the command") == Ending()
