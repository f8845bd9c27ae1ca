"""The plan verb with the installed engine, and real runs that hold the plan to the byte."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.command import Finished, kvpipe
from tests.conftest import ONE_LAYER
from tests.helpers_config import EXPERIMENTS, ROOT

pytestmark = pytest.mark.early


def plan(cwd: Path, *overrides: str) -> Finished:
    """Run ``plan`` in an empty directory, as on a machine whose jax is configured for a TPU."""
    return kvpipe(cwd, "plan", *overrides, JAX_PLATFORMS="tpu")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The plans of all experiments, below ``plans``, of one sweep."""
    cwd = tmp_path_factory.mktemp("experiments")
    (cwd / "plans").mkdir()
    return plan(
        cwd,
        "-m",
        "plan.format=markdown",
        "plan.compile=false",
        f"+experiment={','.join(EXPERIMENTS)}",
        "plan.file=plans/${experiment}.plan.md",
    )


def test_every_committed_plan_is_what_the_engine_gives_now(plans: Finished) -> None:
    """If this fails, run `make plans` and look at what the change costs."""
    assert plans.exit_code == 0, plans.stderr
    given = {path.name: path.read_text() for path in (plans.cwd / "plans").iterdir()}
    committed = {
        path.name: path.read_text() for path in (ROOT / "conf/experiment").glob("*.plan.md")
    }
    assert given.keys() == {f"{name}.plan.md" for name in EXPERIMENTS}
    assert committed == given


@pytest.mark.parametrize(
    ("experiment", "kv"),
    [("qwen25_3b_bigkv", 9_663_750_144), ("qwen25_3b_kv32k", 2_415_992_832)],
)
def test_the_sops_bytes_are_planned_exactly_and_without_weights(
    plans: Finished, experiment: str, kv: int
) -> None:
    params = 8_115_298_304  # of Qwen2.5-3B as 0.0.2 places them over 4 devices
    text = (plans.cwd / f"plans/{experiment}.plan.md").read_text()
    assert "v4:2x2x1, 4 devices, sglang-jax 0.0.2." in text
    assert f"of a device's {32 * 2**30:,} bytes less {128 << 20:,} for fragmentation" in text
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if "|" in line)
    ready, peak = rows["`engine_ready_dummy`"], rows["`kv_cache_rebuilt`"]
    padding = 73_728  # of the norms and biases of a set
    once, whole = params + kv + padding, 2 * (params + padding) + kv
    assert cells(ready) == [params, kv, 0, 0, padding, once, once // 4]
    assert cells(peak) == [params, kv, 0, params, 2 * padding, whole, whole // 4]
    assert not any(path.suffix == ".safetensors" for path in plans.cwd.rglob("*"))


def cells(row: str) -> list[int]:
    """Return the numbers of a row of a plan; an empty cell is 0."""
    return [int(cell.strip().replace(",", "") or 0) for cell in row.split("|")]


def does_not_fit(cwd: Path, most: int, *overrides: str) -> None:
    """Plan for a v5e-4: twice ``most`` tokens, ``most``, which must fit, and one page more."""
    tokens = (f"engine.max_total_tokens={2 * most},{most},{most + 16}", "engine.page_size=16")
    done = plan(cwd, "-m", "plan.format=json", "plan.target=v5e:2x2", *tokens, *overrides)
    assert done.exit_code == 1
    fits = [line["fit"] for line in done.lines]
    assert [fit["fits"] for fit in fits] == [False, True, False]
    assert {fit["max_total_tokens"] for fit in fits} == {most}
    assert {line["target"] for line in done.lines} == {"v5e:2x2x1"}
    assert fits[0]["peak_phase"] == "sglang_param_dict_ready"
    assert done.stderr.count(f"engine.max_total_tokens={most} would fit") == 2
    assert "step 'sglang_param_dict_ready' needs " in done.stderr


# The first tier looks for the largest capacity in process (tests/plan/test_targets.py).
@pytest.mark.nightly(finds="a plan verb that does not pass on that a plan does not fit")
def test_what_does_not_fit_is_refused_with_peak_and_capacity_and_that_capacity_fits(
    tmp_path: Path,
) -> None:
    does_not_fit(tmp_path, 8_944_928, "engine.tp_size=4")


@pytest.mark.nightly(finds="a capacity that is rounded otherwise where the weights take most of it")
def test_what_does_not_fit_beside_real_weights_is_refused_in_the_same_way(tmp_path: Path) -> None:
    does_not_fit(tmp_path, 635_568, "+experiment=qwen25_3b_bigkv")


@pytest.mark.nightly(finds="a largest capacity that data-parallel ranks change")
def test_what_does_not_fit_on_two_data_parallel_ranks_is_refused_in_the_same_way(
    tmp_path: Path,
) -> None:
    does_not_fit(tmp_path, 8_942_880, "engine.tp_size=2", "engine.dp_size=2")


@pytest.mark.nightly(finds="a sweep of plans that ends with the first refused one")
def test_heads_that_the_mesh_cannot_part_are_refused_and_do_not_end_the_sweep(
    tmp_path: Path,
) -> None:
    done = plan(
        tmp_path,
        *["-m", "plan.format=json", "plan.target=v4-64", "engine.tp_size=32"],
        *["model.generate.num_attention_heads=3,32,16", "model.generate.num_key_value_heads=1"],
    )
    assert done.exit_code == 2
    (line,) = done.lines
    assert (line["target"], line["devices"]) == ("v4:2x4x4", 32)
    ready = line["phases"][2]
    assert ready["max_device_bytes"] * 32 == ready["total_bytes"]
    refused = [line for line in done.stderr.splitlines() if line.startswith("kvpipe: engine.tp")]
    assert refused == [
        f"kvpipe: engine.tp_size is 32, but the model has {heads} attention heads, which it must "
        f"divide; 32 devices take engine.tp_size={tp} engine.dp_size={32 // tp}"
        for heads, tp in ((3, 1), (16, 16))
    ]


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


def random_shapes(count: int, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` model shapes and meshes, such that each kind of choice comes up."""
    draw = random.Random(seed)

    def dealt(*choices: Any) -> Sequence[Any]:
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


SHAPES = random_shapes(5, seed=20261312)


def name_of_shape(shape: dict[str, Any]) -> str:
    """Return the name of a test of this shape."""
    return "-".join(str(value) for value in shape.values())


@pytest.mark.slow
@pytest.mark.nightly(finds="a leaf that one model or mesh alone places otherwise")
@pytest.mark.parametrize("shape", SHAPES, ids=name_of_shape)
def test_a_real_run_measures_what_was_planned_in_every_phase(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    pipeline = tmp_path / "pipeline/shapes.yaml"
    pipeline.parent.mkdir()
    pipeline.write_text(SHAPES_PIPELINE)
    run = kvpipe(
        tmp_path,
        *("--config-dir", str(tmp_path), "pipeline=shapes", "tracking=disabled"),
        *("engine.context_length=256", "sampling.max_new_tokens=8"),
        *(f"{key}={value}" for key, value in shape.items()),
    )
    assert run.exit_code == 0, run.end["error"]
    _, plan_line, *phases, _ = run.lines
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


def test_a_batch_whose_activations_could_fill_this_host_has_the_programs_compiled() -> None:
    """A float32 matrix of 1,000 outputs, so at most 64,000 bytes a token, on a host of 1 GiB."""
    from types import SimpleNamespace

    from kvpipe.config.schema import EngineConfig, Kvpipe, TrainerConfig
    from kvpipe.pipeline.ledger import Size
    from kvpipe.plan.fit import KvCapacity
    from kvpipe.plan.targets import Target
    from kvpipe.worker.planner import _Arrays, _may_not_suffice

    def compiled(**options: Any) -> bool:
        engine = EngineConfig(max_total_tokens=100)
        config = Kvpipe(pipeline=[], engine=engine, trainer=TrainerConfig(length=512, **options))
        matrix: Any = SimpleNamespace(shape=(1000, 10))
        arrays = _Arrays({Size.TRAINER_PARAMS: [matrix]}, {}, {})
        capacity = KvCapacity(202, 100, 1)
        return _may_not_suffice(Target("cpu", 1, 1 << 30), arrays, capacity, config)

    assert [compiled(loss="sft", batch_size=size) for size in (32, 33)] == [False, True]
    assert not compiled(loss="sft", batch_size=64, micro_batch_size=32)
    assert not compiled(batch_size=33)


@pytest.mark.nightly(finds="temporaries of a cache that no host has leave no capacity to advise")
def test_of_a_cache_that_this_host_cannot_have_nothing_is_compiled(tmp_path: Path) -> None:
    """XLA's temporaries on a CPU grow with the cache, so those of 2**31 slots are of no use."""
    done = plan(tmp_path, "plan.format=json", "engine.max_total_tokens=2147483646")
    assert done.exit_code == 1
    (line,) = done.lines
    assert "programs" not in line
    assert line["fit"]["max_total_tokens"] > 2048
    assert f"engine.max_total_tokens={line['fit']['max_total_tokens']} would fit" in done.stderr


@pytest.mark.nightly(finds="a largest micro-batch that does not fit, or one that is too small")
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(tmp_path: Path) -> None:
    """All but 8 MiB of a device beside the arrays are reserved; the activations decide."""
    compiled = (
        "+experiment=tiny_sft",
        ONE_LAYER,
        "plan.format=json",
        "plan.compile=true",
        "trainer.length=64",
    )
    alone = plan(tmp_path, *compiled, "trainer.micro_batch_size=1").lines[0]
    peak = max(phase["max_device_bytes"] for phase in alone["phases"])
    reserve = f"plan.reserve_bytes={alone['fit']['hbm_bytes'] - peak - (8 << 20)}"
    found = plan(tmp_path, *compiled, reserve, "plan.micro_batch=true").lines[0]["fit"]
    most = found["micro_batch_size"]
    assert most in (2, 4, 8)
    sizes = f"trainer.micro_batch_size={most},{2 * most}"
    both = plan(tmp_path, "-m", *compiled, reserve, sizes)
    assert [line["fit"]["fits"] for line in both.lines] == [True, False]
    refused = plan(tmp_path, "+experiment=tiny_sft", "plan.micro_batch=true")
    assert refused.exit_code == 2
    assert "plan.micro_batch: it compiles the gradients; set plan.compile=true" in refused.stderr
