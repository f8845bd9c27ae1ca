"""The plan verb up to its child: what it refuses before one is started, and what it then shows."""

import json
import signal
from contextlib import contextmanager

import psutil
import pytest

from kvpipe.checkpoints.model_dir import check_shape, shape_dir
from kvpipe.checkpoints.tiny import ensure
from kvpipe.config.jax_environment import cpu_environment
from kvpipe.config.schema import Kvpipe, ModelConfig, TinyModel
from kvpipe.errors import EngineError, TimedOut
from kvpipe.parent import planner_client
from kvpipe.parent.child_process import start_child
from kvpipe.parent.planner_client import Planners
from kvpipe.plan.targets import Target
from tests.config.test_jax_environment import MEMORY
from tests.helpers_config import ROOT, compose_plain, config_of, default_names
from tests.in_process import Answer
from tests.refusal import refusal
from tests.report.test_plan import MARKDOWN, PLAN


@pytest.fixture
def planned(monkeypatch):
    """Let every plan be :data:`PLAN`; return the targets that were planned for."""
    targets = []

    def plan(self, config, plain, target):
        targets.append(target)
        return PLAN

    monkeypatch.setattr(Planners, "plan", plan)
    return targets


REFUSED = {
    "plan.target=v5x:2x2": "plan.target is 'v5x:2x2'; did you mean ",
    "plan.target=v4:2x2x1": "engine.tp_size × engine.dp_size is 2 × 1, but v4:2x2x1 has 4 devices",
    "plan.compile=yes_please": "plan.compile is 'yes_please'; valid are: auto, false, true",
    "plan.format=yaml": "plan.format: Invalid value 'yaml', expected one of [table, markdown, json]",
    "model.generate=null": "model.config: a plan needs the shape of 'kvpipe/tiny-qwen2' and never",
    "model.generate=null model.config=qwen2.5-3b.json": (
        "model.config: there is no 'qwen2.5-3b.json' in conf/model/configs, and no file of this "
        "path; did you mean "
        "'qwen3-4b.json' or 'qwen2.5-3b-instruct.json'?"
    ),
    "+experiment=qwen25_3b_bigkv model.id=Qwen/Qwen2.5-7B-Instruct": (
        "model.config: a plan needs the shape of 'Qwen/Qwen2.5-7B-Instruct' and never"
    ),
    "+experiment=qwen25_3b_bigkv model.id=Qwen/Qwen3-4B model.config=qwen2.5-3b-instruct.json": (
        "model.config is 'qwen2.5-3b-instruct.json', but the config of 'Qwen/Qwen3-4B' is "
        "'qwen3-4b.json'; leave model.config out"
    ),
    "model.generate.head_dim=3": "model.generate.head_dim is 3, it must be even for RoPE",
    f"pipeline.{default_names().index('kv_cache_dropped')}=flush_cache": "pipeline: ",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_reported_in_one_line_with_exit_code_2_before_a_child_is_started(
    kvpipe, planned, line
):
    answer = kvpipe("plan", *line.split())
    assert (answer.code, answer.out, planned) == (2, "", [])
    assert answer.err.startswith(f"kvpipe: {REFUSED[line]}")
    assert answer.err.count("\n") == 1


def test_each_format_goes_to_stdout(kvpipe, planned):
    assert kvpipe("plan", "plan.format=markdown").out == MARKDOWN.replace("mine", "tiny")
    assert json.loads(kvpipe("plan", "plan.format=json").out)["target"] == "v4:2x2x1"
    assert "engine_ready_dummy" in kvpipe("plan").out


def test_a_file_gets_the_plan_instead_and_its_name_may_have_the_experiments(
    kvpipe, planned, tmp_path
):
    answer = kvpipe("plan", "plan.format=markdown", "plan.file=${experiment}.md")
    assert answer == Answer(0, "", "")
    assert (tmp_path / "tiny.md").read_text() == MARKDOWN.replace("mine", "tiny")


def test_a_file_that_cannot_be_written_is_reported(kvpipe, planned):
    why = "kvpipe: plan.file: cannot write nowhere/plan.md: No such file or directory\n"
    assert kvpipe("plan", "plan.file=nowhere/plan.md") == Answer(2, "", why)


def test_the_target_follows_the_engines_device_and_is_overridden_by_name(kvpipe, planned):
    tpu = "+experiment=qwen25_3b_bigkv"
    for overrides in ([], [tpu], [tpu, "plan.target=v6e:1x1x1"]):
        kvpipe("plan", *overrides)
    of_cpu, of_tpu, named = planned
    assert (of_cpu.name, of_cpu.devices) == ("cpu", 2)
    assert (of_tpu.name, of_tpu.devices) == ("v4:2x2x1", 4)
    assert (named.name, named.devices) == ("v6e:1x1x1", 1)


def test_the_shape_of_a_generated_model_is_its_checkpoints_config_without_the_weights(tmp_path):
    config = Kvpipe(model=ModelConfig(id="x", generate=TinyModel(num_hidden_layers=2)))
    check_shape(config)
    directory = shape_dir(config, tmp_path)
    whole = ensure(TinyModel(num_hidden_layers=2), tmp_path / "cache")
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    assert json.loads((directory / "config.json").read_text()) == json.loads(
        (whole / "config.json").read_text()
    )


def test_a_model_directory_wins_over_the_config_that_ships(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = Kvpipe(model=ModelConfig(id="x", path=str(tmp_path), config="nosuch.json"))
    check_shape(config)
    assert shape_dir(config, tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("model", "name", "shipped"),
    [
        ("someone/finetune", "qwen2.5-3b-instruct.json", "qwen2.5-3b-instruct.json"),
        ("Qwen/Qwen2.5-3B-Instruct", None, "qwen2.5-3b-instruct.json"),
        ("Qwen/Qwen3-4B", None, "qwen3-4b.json"),
    ],
)
def test_a_config_that_ships_is_found_by_its_name_or_by_the_models(tmp_path, model, name, shipped):
    config = Kvpipe(model=ModelConfig(id=model, config=name))
    check_shape(config)
    shape = json.loads((shape_dir(config, tmp_path) / "config.json").read_text())
    assert shape == json.loads((ROOT / "conf/model/configs" / shipped).read_text())


def test_a_config_can_lie_in_a_directory_of_the_users_own(tmp_path):
    (tmp_path / "mine.json").write_text('{"num_hidden_layers": 7}')
    config = Kvpipe(model=ModelConfig(id="my/model", config=str(tmp_path / "mine.json")))
    check_shape(config)
    assert (shape_dir(config, tmp_path) / "config.json").read_text() == '{"num_hidden_layers": 7}'


def test_a_name_that_leaves_the_folder_of_configs_is_refused():
    outside = Kvpipe(model=ModelConfig(id="x", config="../qwen25_3b.yaml"))
    assert "there is no '../qwen25_3b.yaml'" in refusal(check_shape, outside)


def test_the_planning_process_finds_virtual_cpu_devices_whatever_it_inherits():
    inherited = {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": "--xla_a=b"}
    assert cpu_environment(8, inherited) == {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_a=b --xla_force_host_platform_device_count=8",
        "GLIBC_TUNABLES": MEMORY,
    }


def test_a_planning_process_that_dies_is_reported_with_the_end_of_its_log(monkeypatch, tmp_path):
    plain = compose_plain()
    broken = tmp_path / "kvpipe/worker"
    broken.mkdir(parents=True)
    for package in (broken.parent, broken):
        (package / "__init__.py").touch()
    (broken / "planner.py").write_text("raise SystemExit('no engine here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    died = pytest.raises(EngineError, match=r"ended by exit code 1; .*\nno engine here")
    with died, Planners() as planners:
        planners.plan(config_of(plain), plain, Target("cpu", 2, 10**9))


def test_a_planning_process_that_hangs_is_ended_within_the_limit_and_the_next_plan_has_a_new_one(
    monkeypatch,
):
    """The parent waited for its answer without a limit."""

    @contextmanager
    def stopped(*arguments):
        with start_child(*arguments) as child:
            child.process.send_signal(signal.SIGSTOP)
            yield child

    monkeypatch.setattr(planner_client, "start_child", stopped)
    plain = compose_plain("plan.timeout_s=0.1")
    with Planners() as planners:
        for _ in range(2):
            with pytest.raises(TimedOut, match=r"the plan took longer than plan.timeout_s = 0.1 s"):
                planners.plan(config_of(plain), plain, Target("cpu", 2, 1))
            assert planners._children == {}
    assert psutil.Process().children() == []
