"""Every experiment that ships: it composes to what it says, builds, and its order holds."""

import hashlib
import json

import pytest

from kvpipe.jax_environment import check_mesh
from kvpipe.model_dir import check_model
from kvpipe.plan import check_order
from kvpipe.prompt import read_prompt
from kvpipe.steps import build_steps
from tests.helpers_config import EXPERIMENTS, ROOT, compose_plain, config_of, default_names
from tests.sop import STEPS

# The SOP's script gives the prompt as base64; this is the SHA-256 of what that decodes to.
SOP_SHA256 = "a25011bf8712b7c88b7a65496b98056b95462ed9225228d72c9c1bc17a2362f0"

PHASES = {
    "sglang_param_dict_ready": {"use": "param_dict", "slot": "param_dict"},
    "after_cleanup": {"use": "release", "slots": ["param_dict"]},
    "generate_result": {"use": "generate", "log_text": True},
    "flush_cache_before_kv_drop": {"use": "flush_cache"},
    "sglang_param_dict2_ready": {"use": "param_dict", "slot": "param_dict2"},
    "after_drop_mllm_params_cpu": {"use": "release", "host": ["mllm"]},
    "generate_result_after_kv_rebuild": {
        "use": "generate",
        "same_output_as": "generate_result",
        "log_text": True,
    },
    "after_drop_param_dict2": {"use": "release", "slots": ["param_dict2"]},
}
RUNNER = {
    "isolate": True,
    "idle_timeout_s": 60.0,
    "shutdown_timeout_s": 60.0,
    "sample_peaks": True,
    "heartbeat_s": 30.0,
    "phase_timeout_s": None,
    "phase_timeouts": {},
    "run_timeout_s": None,
    "on_error": "stop",
}

PLAN = {
    "enforce": True,
    "allowance_bytes": 512 * 1024**2,
    "format": "table",
    "target": None,
    "file": None,
    "compile": False,
    "prompt_tokens": None,
}
COMPARE_PLANS = {"base": None, "head": None, "overrides": [], "budget_bytes": 0}
TRAINER = {
    "dtype": "float32",
    "gradients_dtype": None,
    "mu_dtype": None,
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "seed": 0,
}
DESCRIBE = {"phase": None, "format": "table"}
COMPARE = {
    "format": "markdown",
    "file": None,
    "budget_bytes": 0,
    "allowance_bytes": 512 * 1024**2,
    "outputs": True,
    "duration_factor": None,
    "compilations": None,
}
REPORT = {"dir": None}
TINY = {
    "experiment": "tiny",
    "pipeline": default_names(),
    "phases": PHASES,
    "repeat": None,
    "model": {
        "id": "kvpipe/tiny-qwen2",
        "path": None,
        "revision": None,
        "config": None,
        "generate": {
            "seed": 0,
            "architecture": "Qwen2ForCausalLM",
            "hidden_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 1024,
            "vocab_size": 512,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "max_position_embeddings": 2048,
        },
    },
    "engine": {
        "device": "cpu",
        "virtual_devices": None,
        "tp_size": 2,
        "dp_size": 1,
        "nnodes": 1,
        "node_rank": None,
        "dist_init_addr": None,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_total_tokens": 2048,
        "context_length": 512,
        "page_size": 1,
        "max_running_requests": 4,
        "max_prefill_tokens": 256,
        "mem_fraction_static": 0.8,
        "random_seed": 0,
        "precompile": False,
        "download_dir": None,
        "trust_remote_code": False,
        "log_level": "info",
        "watchdog_timeout": 1800.0,
    },
    "trainer": TRAINER,
    "prompt": {"text": "Hello", "file": None, "sha256": None},
    "sampling": {"max_new_tokens": 64, "temperature": 0.0, "ignore_eos": False},
    "tracking": {
        "mode": "offline",
        "project": "kvpipe",
        "name": None,
        "entity": None,
        "group": None,
        "tags": [],
        "fallback_offline": False,
        "init_timeout_s": 30.0,
        "finish_timeout_s": 60.0,
        "text_max_chars": 20000,
    },
    "runner": RUNNER,
    "plan": PLAN,
    "compare_plans": COMPARE_PLANS,
    "compare": COMPARE,
    "describe": DESCRIBE,
    "report": REPORT,
    "sweep": {"resume": False},
    "output": "auto",
    "cache_dir": None,
}

BIGKV = {
    "experiment": "qwen25_3b_bigkv",
    "pipeline": default_names(),
    "phases": PHASES,
    "repeat": None,
    "model": {
        "id": "Qwen/Qwen2.5-3B-Instruct",
        "path": None,
        "revision": None,
        "config": "qwen2.5-3b-instruct.json",
        "generate": None,
    },
    "engine": {
        "device": "tpu",
        "virtual_devices": None,
        "tp_size": None,  # the device count
        "dp_size": 1,
        "nnodes": 1,
        "node_rank": None,
        "dist_init_addr": None,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_total_tokens": 131072,
        "context_length": None,
        "page_size": 1,
        "max_running_requests": 16,
        "max_prefill_tokens": 1024,
        "mem_fraction_static": 0.8,
        "random_seed": 0,
        "precompile": False,
        "download_dir": None,
        "trust_remote_code": False,
        "log_level": "info",
        "watchdog_timeout": 1800.0,
    },
    "trainer": TRAINER,
    "prompt": {"text": None, "file": "pkg://conf/prompt/sop_code.txt", "sha256": SOP_SHA256},
    "sampling": {"max_new_tokens": 4096, "temperature": 0.0, "ignore_eos": False},
    "tracking": {
        "mode": "online",
        "project": "sglang-jax-qwen25-3b-kv-drop-rebuild-bigkv",
        "name": "qwen25_3b_kv_big_131072_det0_same",
        "entity": None,
        "group": None,
        "tags": [],
        "fallback_offline": False,
        "init_timeout_s": 30.0,
        "finish_timeout_s": 60.0,
        "text_max_chars": 20000,
    },
    "runner": RUNNER,
    "plan": PLAN,
    "compare_plans": COMPARE_PLANS,
    "compare": COMPARE,
    "describe": DESCRIBE,
    "report": REPORT,
    "sweep": {"resume": False},
    "output": "auto",
    "cache_dir": None,
}


def test_the_experiments_that_ship_are_those_that_were_asked_for():
    assert EXPERIMENTS == [
        "qwen25_3b_bigkv",
        "qwen25_3b_kv32k",
        "qwen25_3b_param_swap",
        "qwen25_3b_rl_cycle",
        "qwen3_4b",
        "tiny",
        "tiny_cycles",
        "tiny_drop_rebuild_aa",
        "tiny_offload_restore",
        "tiny_rl_cycle",
        "tiny_stream",
    ]


def test_the_default_pipeline_has_the_steps_of_the_sop_in_their_order():
    assert [step for step in default_names() if step in STEPS] == STEPS


def test_tiny_is_composed_of_exactly_these_values():
    assert compose_plain("+experiment=tiny") == TINY


def test_without_an_experiment_the_config_is_that_of_tiny():
    assert compose_plain() == TINY


def test_the_run_of_the_sop_is_composed_of_exactly_these_values():
    assert compose_plain("+experiment=qwen25_3b_bigkv") == BIGKV


def test_the_prompt_of_the_sop_is_shipped_to_the_byte():
    data = (ROOT / "conf/prompt/sop_code.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SOP_SHA256


def test_the_32k_run_is_the_sop_with_a_small_cache_and_a_short_prompt():
    tracking = {"project": "sglang-jax-qwen25-3b-kv-drop-rebuild", "name": None}
    assert compose_plain("+experiment=qwen25_3b_kv32k") == BIGKV | {
        "experiment": "qwen25_3b_kv32k",
        "engine": BIGKV["engine"] | {"max_total_tokens": 32768},
        "prompt": TINY["prompt"],
        "sampling": TINY["sampling"],
        "tracking": BIGKV["tracking"] | tracking,
    }


def test_the_param_swap_keeps_the_dict_through_the_generate_and_drops_it_then():
    tracking = {"project": "sglang-jax-qwen25-3b-param-swap", "name": None}
    assert compose_plain("+experiment=qwen25_3b_param_swap") == BIGKV | {
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
        "engine": BIGKV["engine"] | {"max_total_tokens": 4096},
        "prompt": TINY["prompt"],
        "sampling": TINY["sampling"],
        "tracking": BIGKV["tracking"] | tracking,
    }


def test_qwen3_4b_is_the_sop_with_another_model():
    tracking = {"project": "sglang-jax-qwen3-4b-kv-drop-rebuild", "name": None}
    model = {"id": "Qwen/Qwen3-4B", "config": "qwen3-4b.json"}
    assert compose_plain("+experiment=qwen3_4b") == BIGKV | {
        "experiment": "qwen3_4b",
        "model": BIGKV["model"] | model,
        "tracking": BIGKV["tracking"] | tracking,
    }


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
def test_every_model_of_a_tpu_experiment_ships_the_config_that_planning_needs(name):
    model = compose_plain(f"+experiment={name}")["model"]
    shipped = json.loads((ROOT / "conf/model/configs" / model["config"]).read_text())
    assert shipped["architectures"][0] in {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def test_the_typed_config_gives_the_same_plain_values_back():
    """What the worker gets through a pipe is what the parent checked."""
    from omegaconf import OmegaConf

    from kvpipe.schema import to_plain

    for expected in (TINY, BIGKV):
        assert to_plain(OmegaConf.structured(config_of(expected))) == expected


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("sampling.max_new_tokens=5", "sampling", "max_new_tokens", 5),
        ("engine.max_total_tokens=4096", "engine", "max_total_tokens", 4096),
        ("sampling.temperature=1", "sampling", "temperature", 1.0),
        ("tracking.mode=online", "tracking", "mode", "online"),
        ("tracking.tags=[a,b]", "tracking", "tags", ["a", "b"]),
        ("engine.tp_size=null", "engine", "tp_size", None),
    ],
)
def test_an_override_changes_its_key_and_nothing_else(override, section, key, value):
    assert compose_plain(override) == TINY | {section: TINY[section] | {key: value}}


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_option_of_a_step_is_overridden_with_or_without_a_plus(plus):
    """Hydra closes the dictionaries of a composed config; the schema opens this one again."""
    composed = compose_plain(f"{plus}phases.generate_result.max_new_tokens=5")
    changed = PHASES["generate_result"] | {"max_new_tokens": 5}
    assert composed == TINY | {"phases": PHASES | {"generate_result": changed}}


def test_options_of_a_step_that_has_none_yet_need_no_plus_either():
    composed = compose_plain("phases.weights_swapped_from_mllm.probe_tokens=0")
    assert composed["phases"] == PHASES | {"weights_swapped_from_mllm": {"probe_tokens": 0}}


def test_an_experiment_of_ones_own_may_list_its_own_steps(tmp_path):
    """A list replaces the default's; options of steps that it leaves out have to go too."""
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
