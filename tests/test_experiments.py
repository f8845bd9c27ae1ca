"""Every experiment that ships: it composes to what it says, builds, and its order holds."""

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict
from functools import reduce
from operator import getitem

import pytest
from omegaconf import OmegaConf

from kvpipe.checkpoints.model_dir import check_model, shape_dir
from kvpipe.config.jax_environment import check_mesh
from kvpipe.config.prompt import read_prompt
from kvpipe.config.schema import TinyModel, schema, to_plain
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fold import check_order
from tests.helpers_config import EXPERIMENTS, ROOT, compose_plain, config_of
from tests.sop import STEPS

# The SOP's script gives the prompt as base64; this is the SHA-256 of what that decodes to.
SOP_SHA256 = "a25011bf8712b7c88b7a65496b98056b95462ed9225228d72c9c1bc17a2362f0"

DEFAULT = compose_plain()


def changed(plain, changes):
    """Return a whole config with some of its values changed, each by its dotted key."""
    result = deepcopy(plain)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = reduce(getitem, sections, result)
        assert name in section, f"{key}: there is no such key"
        section[name] = value
    return result


# The model of the SOP, on a TPU.
QWEN25_3B = {
    "model.id": "Qwen/Qwen2.5-3B-Instruct",
    "model.generate": None,
    "engine.device": "tpu",
    "engine.tp_size": None,  # the device count
    "engine.max_total_tokens": 4096,
    "engine.context_length": None,
    "engine.max_running_requests": 16,
    "engine.max_prefill_tokens": 1024,
    "tracking.mode": "online",
}
BIGKV = QWEN25_3B | {
    "experiment": "qwen25_3b_bigkv",
    "engine.max_total_tokens": 131072,
    "prompt.text": None,
    "prompt.file": "pkg://conf/prompt/sop_code.txt",
    "prompt.sha256": SOP_SHA256,
    "sampling.max_new_tokens": 4096,
    "tracking.project": "sglang-jax-qwen25-3b-kv-drop-rebuild-bigkv",
    "tracking.name": "qwen25_3b_kv_big_131072_det0_same",
}


def test_the_experiments_that_ship_are_those_that_were_asked_for():
    assert EXPERIMENTS == [
        "qwen25_3b_bigkv",
        "qwen25_3b_grpo",
        "qwen25_3b_kv32k",
        "qwen25_3b_param_swap",
        "qwen25_3b_rl_cycle",
        "qwen3_4b",
        "tiny",
        "tiny_async_cycle",
        "tiny_cycles",
        "tiny_drop_rebuild_aa",
        "tiny_grpo",
        "tiny_kv_auto",
        "tiny_offload_restore",
        "tiny_rl_cycle",
        "tiny_rollout",
        "tiny_rollout_paused",
        "tiny_sft",
        "tiny_stream",
    ]


def test_the_default_is_the_schemas_with_a_generated_model_on_two_virtual_devices():
    schema_alone = OmegaConf.to_container(schema(), enum_to_str=True)
    assert (
        changed(
            schema_alone,
            {
                "experiment": "tiny",
                "pipeline": DEFAULT["pipeline"],  # the steps of the SOP: see below
                "phases": DEFAULT["phases"],  # their options: tests/pipeline/test_steps.py
                "model.id": "kvpipe/tiny-qwen2",
                "model.generate": asdict(TinyModel()),
                "engine.device": "cpu",
                "engine.tp_size": 2,
                "engine.max_total_tokens": 2048,
                "engine.context_length": 512,
                "engine.max_running_requests": 4,
                "engine.max_prefill_tokens": 256,
                "prompt.text": "Hello",
            },
        )
        == DEFAULT
    )


def test_the_default_pipeline_has_the_steps_of_the_sop_in_their_order():
    assert [step for step in DEFAULT["pipeline"] if step in STEPS] == STEPS


def test_tiny_is_the_default():
    assert compose_plain("+experiment=tiny") == DEFAULT


def test_the_run_of_the_sop_changes_exactly_these_values():
    assert compose_plain("+experiment=qwen25_3b_bigkv") == changed(DEFAULT, BIGKV)


def test_the_prompt_of_the_sop_is_shipped_to_the_byte():
    data = (ROOT / "conf/prompt/sop_code.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SOP_SHA256


def test_the_32k_run_is_the_sop_with_a_small_cache_and_a_short_prompt():
    changes = {
        "experiment": "qwen25_3b_kv32k",
        "engine.max_total_tokens": 32768,
        "tracking.project": "sglang-jax-qwen25-3b-kv-drop-rebuild",
    }
    composed = compose_plain("+experiment=qwen25_3b_kv32k")
    assert composed == changed(DEFAULT, QWEN25_3B | changes)


def test_the_param_swap_keeps_the_dict_through_the_generate_and_drops_it_then():
    changes = {
        "experiment": "qwen25_3b_param_swap",
        "pipeline": [
            *STEPS[:7],
            "before_generate_param_dict_kept",
            "generate_result",
            "after_drop_param_dict",
        ],
        "phases": {
            "sglang_param_dict_ready": {"use": "param_dict", "slot": "param_dict"},
            "before_generate_param_dict_kept": {"use": "release", "host": ["mllm"]},
            "generate_result": {"use": "generate", "log_text": True},
            "after_drop_param_dict": {"use": "release", "slots": ["param_dict"]},
        },
        "tracking.project": "sglang-jax-qwen25-3b-param-swap",
    }
    composed = compose_plain("+experiment=qwen25_3b_param_swap")
    assert composed == changed(DEFAULT, QWEN25_3B | changes)


def test_qwen3_4b_is_the_sop_with_another_model():
    changes = {
        "experiment": "qwen3_4b",
        "model.id": "Qwen/Qwen3-4B",
        "tracking.project": "sglang-jax-qwen3-4b-kv-drop-rebuild",
        "tracking.name": None,
    }
    assert compose_plain("+experiment=qwen3_4b") == changed(DEFAULT, BIGKV | changes)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_passes_every_check_of_its_input(name):
    config = config_of(compose_plain(f"+experiment={name}"))
    steps = build_steps(config)
    assert [planned.step for planned in check_order(steps)] == list(steps)
    check_mesh(config.engine)
    check_model(config)
    assert read_prompt(config.prompt)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_called_by_the_name_of_its_file_and_starts_with_its_command(name):
    lines = (ROOT / f"conf/experiment/{name}.yaml").read_text().splitlines()
    assert lines[:2] == ["# @package _global_", f"# python -m kvpipe +experiment={name}"]
    assert compose_plain(f"+experiment={name}")["experiment"] == name


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "tiny" not in name])
def test_every_model_of_a_tpu_experiment_ships_the_config_that_planning_needs(name, tmp_path):
    directory = shape_dir(config_of(compose_plain(f"+experiment={name}")), tmp_path)
    shipped = json.loads((directory / "config.json").read_text())
    assert shipped["architectures"][0] in {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def test_the_typed_config_gives_the_same_plain_values_back():
    """The worker receives through a pipe exactly the config that the parent checked."""
    for expected in (DEFAULT, changed(DEFAULT, BIGKV)):
        assert to_plain(OmegaConf.structured(config_of(expected))) == expected


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sampling.max_new_tokens", "5", 5),
        ("engine.max_total_tokens", "4096", 4096),
        ("sampling.temperature", "1", 1.0),
        ("tracking.mode", "online", "online"),
        ("tracking.tags", "[a,b]", ["a", "b"]),
        ("engine.tp_size", "null", None),
    ],
)
def test_an_override_changes_its_key_and_nothing_else(key, text, value):
    assert compose_plain(f"{key}={text}") == changed(DEFAULT, {key: value})


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_option_of_a_step_is_overridden_with_or_without_a_plus(plus):
    """Hydra closes the dictionaries of a composed config; the schema opens this one again."""
    composed = compose_plain(f"{plus}phases.generate_result.max_new_tokens=5")
    options = DEFAULT["phases"]["generate_result"] | {"max_new_tokens": 5}
    assert composed == changed(DEFAULT, {"phases.generate_result": options})


def test_options_of_a_step_that_has_none_yet_need_no_plus_either():
    composed = compose_plain("phases.weights_swapped_from_mllm.probe_tokens=0")
    options = {"weights_swapped_from_mllm": {"probe_tokens": 0}}
    assert composed["phases"] == DEFAULT["phases"] | options


def test_an_experiment_of_ones_own_may_list_its_own_steps(tmp_path):
    """A list replaces the default's; the options of steps that it leaves out must go too."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /pipeline: param_swap\n"
        "experiment: mine\n"
        "sampling: {max_new_tokens: 3}\n"
    )
    composed = compose_plain(f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")
    assert composed["experiment"] == "mine"
    assert composed["sampling"]["max_new_tokens"] == 3
    assert composed["pipeline"][-1] == "after_drop_param_dict"
    assert len(check_order(build_steps(config_of(composed)))) == 10
