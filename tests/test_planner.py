"""The plan verb with the installed engine, and real runs that hold the plan to the byte."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.helpers_config import EXPERIMENTS, ROOT

pytestmark = pytest.mark.slow

PARAMS = 8_115_298_304  # of Qwen2.5-3B as 0.0.2 places them over 4 devices
KV_131072, KV_32768 = 9_663_750_144, 2_415_992_832


@dataclass(frozen=True)
class Answer:
    code: int
    lines: list
    err: str


def kvpipe(*arguments, cwd):
    """Run the command line in an empty directory, as on a machine whose jax is told to be a TPU's."""
    done = subprocess.run(
        [sys.executable, "-m", "kvpipe", *arguments],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "tpu", "XDG_CACHE_HOME": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    return Answer(done.returncode, [json.loads(line) for line in lines], done.stderr)


def plan(*overrides, cwd):
    return kvpipe("plan", *overrides, "plan.format=json", cwd=cwd)


def test_the_sops_bytes_are_planned_exactly_and_quickly_without_weights(tmp_path):
    began = os.times()
    answer = plan("-m", "+experiment=qwen25_3b_bigkv,qwen25_3b_kv32k", cwd=tmp_path)
    ended = os.times()
    assert answer.code == 0
    big, small = answer.lines
    assert {key: big[key] for key in ("target", "devices", "sglang_jax")} == {
        "target": "v4:2x2x1",
        "devices": 4,
        "sglang_jax": "0.0.2",
    }
    ready = big["phases"][2]
    assert ready == {
        "name": "engine_ready_dummy",
        "pools": {"params": PARAMS, "kv": KV_131072},
        "total_bytes": PARAMS + KV_131072,
        "max_device_bytes": (PARAMS + KV_131072) // 4,
    }
    assert small["phases"][2]["pools"] == {"params": PARAMS, "kv": KV_32768}
    peak = next(phase for phase in big["phases"] if phase["name"] == "kv_cache_rebuilt")
    assert peak["pools"] == {"params": PARAMS, "kv": KV_131072, "slot:param_dict2": PARAMS}
    assert big["fit"]["fits"]
    assert big["fit"]["hbm_bytes"] == 32 * 2**30
    # CPU seconds of both plans together: a machine that others use too must not fail this.
    assert ended.children_user - began.children_user < 20
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def test_what_does_not_fit_a_v5e_is_refused_with_peak_and_capacity_and_that_capacity_fits(tmp_path):
    on_v5e = ("+experiment=qwen25_3b_bigkv", "plan.target=v5e:2x2", "engine.page_size=16")
    too_big = plan(*on_v5e, "engine.max_total_tokens=2000000", cwd=tmp_path)
    (record,) = too_big.lines
    fit = record["fit"]
    assert (too_big.code, record["target"], fit["fits"]) == (1, "v5e:2x2x1", False)
    assert fit["peak_phase"] == "sglang_param_dict_ready"
    most = fit["max_total_tokens"]
    assert f"engine.max_total_tokens={most} would fit" in too_big.err
    assert "step 'sglang_param_dict_ready' needs " in too_big.err
    both = plan("-m", *on_v5e, f"engine.max_total_tokens={most},{most + 16}", cwd=tmp_path)
    assert both.code == 1
    assert [line["fit"]["fits"] for line in both.lines] == [True, False]
    assert {line["fit"]["max_total_tokens"] for line in both.lines} == {most}


def test_heads_that_the_mesh_cannot_part_are_told_and_do_not_end_the_sweep(tmp_path):
    heads = "model.generate.num_attention_heads=3,4"
    answer = plan("-m", heads, "model.generate.num_key_value_heads=1", cwd=tmp_path)
    assert answer.code == 2
    assert len(answer.lines) == 1
    assert "kvpipe: engine.tp_size is 2, but the model has 3 attention heads" in answer.err


def test_every_committed_plan_is_what_the_engine_gives_now(tmp_path):
    """If this fails, run `make plans` and look at what the change costs."""
    (tmp_path / "plans").mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvpipe", "plan", "-m", "plan.format=markdown"),
            f"+experiment={','.join(EXPERIMENTS)}",
            "plan.file=plans/${experiment}.plan.md",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    given = {path.name: path.read_text() for path in (tmp_path / "plans").iterdir()}
    committed = {
        path.name: path.read_text() for path in (ROOT / "conf/experiment").glob("*.plan.md")
    }
    assert committed == given


SHAPES_PIPELINE = """\
# @package _global_
pipeline:
  - jax_ready
  - engine_ready_dummy
  - mllm_params_cpu_ready
  - first
  - weights_swapped_from_mllm
  - kv_cache_dropped
  - second
  - kv_cache_rebuilt
  - after
  - dropped_again
  - rebuilt_again
phases:
  kv_cache_rebuilt: {max_total_tokens: 400}
  dropped_again: {use: kv_cache_dropped}
  rebuilt_again: {use: kv_cache_rebuilt}
  first: {use: param_dict, slot: param_dict}
  weights_swapped_from_mllm: {probe_tokens: 0}
  second: {use: param_dict, slot: second}
  after: {use: release, slots: [param_dict, second]}
"""


def random_shapes(count, seed):
    """Return ``count`` model shapes and meshes, such that each kind of choice comes up."""
    draw = random.Random(seed)

    def dealt(*choices):
        hand = [choices[i % len(choices)] for i in range(count)]
        draw.shuffle(hand)
        return hand

    meshes, heads = dealt(1, 2, 4), dealt((4, 1), (4, 2), (8, 8), (4, 4), (8, 2))
    architectures = dealt("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
    tied, pages = dealt(True, False), dealt(1, 16, 64)
    return [
        {
            "model.generate.architecture": architectures[i],
            "model.generate.num_hidden_layers": draw.randint(1, 4),
            "model.generate.num_attention_heads": heads[i][0],
            "model.generate.num_key_value_heads": heads[i][1],
            "model.generate.hidden_size": 64 * draw.randint(2, 6),
            "model.generate.intermediate_size": 64 * draw.randint(2, 8),
            "model.generate.vocab_size": 64 * draw.randint(5, 9),
            "model.generate.tie_word_embeddings": tied[i],
            "engine.tp_size": meshes[i],
            "engine.page_size": pages[i],
            "engine.max_total_tokens": draw.randint(700, 1500),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "shape",
    random_shapes(5, seed=20261124),
    ids=lambda shape: "-".join(str(value) for value in shape.values()),
)
def test_a_real_run_measures_what_was_planned_in_every_phase(tmp_path, shape):
    pipeline = tmp_path / "pipeline/shapes.yaml"
    pipeline.parent.mkdir()
    pipeline.write_text(SHAPES_PIPELINE)
    overrides = [f"{key}={value}" for key, value in shape.items()]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvpipe", "--config-dir", str(tmp_path), "pipeline=shapes"),
            *("tracking=disabled", f"cache_dir={tmp_path}", "engine.context_length=256"),
            *overrides,
        ],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, lines[-1]["error"]
    _, plan_line, *phases, _ = lines
    planned = {phase["name"]: phase["pools"] for phase in plan_line["phases"]}
    assert [line["phase"] for line in phases] == list(planned)
    for line in phases:
        owned = {pool: size for pool, size in line["ledger"].items() if pool != "other"}
        assert owned == planned[line["phase"]], line["phase"]
        errors = {k: v for k, v in line["plan_error_bytes"].items() if k != "total"}
        assert set(errors.values()) <= {0}, line["phase"]
    assert {"params", "kv", "slot:param_dict"} <= set(phases[3]["ledger"])
    kv = {line["phase"]: line["ledger"].get("kv", 0) for line in phases}
    assert 0 < kv["kv_cache_rebuilt"] < kv["rebuilt_again"] == kv["engine_ready_dummy"]


def test_32_devices_are_planned_and_a_size_that_parts_a_head_is_refused_with_one_that_does_not(
    tmp_path,
):
    answer = plan(
        *["-m", "plan.target=v4-64", "engine.tp_size=32"],
        "model.generate.num_attention_heads=32,16",
        cwd=tmp_path,
    )
    (line,) = answer.lines
    assert (line["target"], line["devices"]) == ("v4:2x4x4", 32)
    ready = line["phases"][2]
    assert ready["max_device_bytes"] * 32 == ready["total_bytes"]
    assert answer.code == 2
    assert answer.err.endswith(
        "kvpipe: engine.tp_size is 32, but the model has 16 attention heads, which it has to "
        "divide; 32 devices take engine.tp_size=16 engine.dp_size=2\n"
    )
