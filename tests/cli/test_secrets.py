"""A secret of the environment in what a person gives is refused before anything is written."""

import pytest

from tests.in_process import files

TOKEN = "hf_" + "0Secret9" * 5
REPORTED = (
    "kvpipe: {}: this contains the secret in the variable HF_TOKEN, and would be recorded and "
    "uploaded; take it out, or unset HF_TOKEN if it is not a secret\n"
)


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ([f"prompt.text=hello {TOKEN}"], "prompt.text"),
        ([f"tracking.tags=[a,{TOKEN}]"], "tracking.tags"),
        ([f"+phases.{TOKEN}.use=release"], "+phases.[redacted].use"),
        ([f"hydra.run.dir=outputs/{TOKEN}"], "hydra.run.dir"),
        (["hydra.run.dir=outputs/${oc.env:HF_TOKEN}"], "hydra.run.dir"),
        ([f"+hydra.job.env_set.NAME={TOKEN}"], "+hydra.job.env_set.NAME"),
        (["check", f"model.id={TOKEN}"], "model.id"),
        (["plan", f"plan.file={TOKEN}.md"], "plan.file"),
        (["-m", f"model.id={TOKEN},b"], "model.id"),
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_nothing_is_written(
    kvpipe, tmp_path, arguments, where
):
    answer = kvpipe(*arguments)
    assert (answer.code, answer.out, answer.err) == (2, "", REPORTED.format(where))
    assert files(tmp_path) == []


def test_a_secret_in_a_file_of_the_users_is_refused_and_nothing_is_written(kvpipe, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"mine/experiment/{name}.yaml").write_text(
            f"# @package _global_\nprompt: {{text: 'mine {TOKEN}', file: null}}\n"
        )
    (tmp_path / "mine/sweep").mkdir()
    (tmp_path / "mine/sweep/names.yaml").write_text(
        "# @package _global_\n"
        f"hydra: {{mode: MULTIRUN, sweeper: {{params: {{model.id: 'a,{TOKEN}'}}}}}}\n"
    )
    (tmp_path / "prompt.txt").write_text(f"mine {TOKEN}")
    before = files(tmp_path)
    config = ["--config-dir", str(tmp_path / "mine")]
    for arguments in ([*config, "+experiment=a"], ["check", *config, "+experiment=a"]):
        assert kvpipe(*arguments).err == REPORTED.format("prompt.text")
    assert kvpipe(*config, "+sweep=names").err == REPORTED.format("model.id")
    assert kvpipe("check", "prompt.text=null", "prompt.file=prompt.txt").err == REPORTED.format(
        "prompt.file"
    )
    reported = kvpipe("check", "+experiment=tiny_rollout", "prompts.file=prompt.txt").err
    assert reported == REPORTED.format("prompts.file")
    assert files(tmp_path) == before
    # Hydra writes the config of a job before it can be seen; the copy is removed.
    answer = kvpipe(*config, "-m", "+experiment=a,b", "hydra.output_subdir=hydra")
    assert answer.err.count(REPORTED.format("prompt.text")) == 2
    left = [tmp_path / name for name in set(files(tmp_path)) - set(before)]
    assert [path for path in left if path.is_file() and TOKEN in path.read_text()] == []


def test_a_secret_given_to_hydra_for_the_environment_is_refused_by_its_name(kvpipe, tmp_path):
    answer = kvpipe("+hydra.job.env_set.OTHER_TOKEN=abc")
    assert answer.code == 2
    assert "hydra.job.env_set.OTHER_TOKEN: this looks like a secret" in answer.err
    assert files(tmp_path) == []


def test_a_secret_that_a_variable_of_wandb_would_bring_in_is_refused(kvpipe, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", f"run {TOKEN}")
    assert (kvpipe().err, kvpipe().code) == (REPORTED.format("tracking.name"), 2)


def test_a_short_secret_refuses_nothing(kvpipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "test")
    assert kvpipe("check", "model.id=test").code == 0
