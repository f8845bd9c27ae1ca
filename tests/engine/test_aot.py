"""Compiling for a TPU on a machine that has none: real libtpu, real kernel, the tiny model."""

from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import EngineConfig
from kvpipe.plan.targets import find_target
from kvpipe.records.run import Program
from tests.command import Finished, kvpipe
from tests.conftest import DEVICES, SMALL_ENGINE, engine_config

# The largest take libtpu seconds, and differ in nothing but size.
ACCELERATORS = ["v4-8", "v5p-16", "v5e-4", "v5litepod-8", "v6e-16"]
SGL_JAX = Path(str(distribution("sglang-jax").locate_file("sgl_jax")))
# HEAD's attention kernel is for v5 and later.
KERNEL_OF_HEAD = SGL_JAX / "srt/kernels/ragged_paged_attention/ragged_paged_attention_v3.py"
TARGET, KIND = ("v5e:2x2x1", "TPU v5 lite") if KERNEL_OF_HEAD.exists() else ("v4:2x2x1", "TPU v4")


@pytest.fixture(scope="module")
def model_dir(model_cache: Path) -> Path:
    """A model of one layer: the compiler takes as long for each layer."""
    return ensure(TinyModel(num_hidden_layers=1), model_cache)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A plan with the tiny model's steps, compiled for four chips; its cache lies below it."""
    cwd = tmp_path_factory.mktemp("plan")
    return kvpipe(
        cwd,
        *("plan", "plan.compile=true", "plan.format=json", f"plan.target={TARGET}"),
        *("plan.prompt_tokens=100", f"cache_dir={cwd}", "model.generate.num_hidden_layers=1"),
        *(f"engine.{name}={value}" for name, value in SMALL_ENGINE.items()),
    )


@pytest.fixture(scope="module")
def compiled(four_devices: None, plan: Finished, model_dir: Path) -> tuple[Program, ...]:
    """The same steps, which come from the plan's cache without a compilation."""
    from kvpipe.engine import aot, program_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_steps", lambda *args: pytest.fail("it was compiled again"))
        return program_cache.compiled(engine_config(), model_dir, TARGET, 100, plan.cwd)


@pytest.mark.parametrize(
    "name", ["v5e-1", "v6e-1", "v5e:1x2", "v4:2x1x1", "v5e:3x2", *ACCELERATORS]
)
def test_libtpu_describes_every_target_that_is_named_as_valid(
    four_devices: None, name: str
) -> None:
    """Those of a single chip failed: their hosts have fewer chips than libtpu takes for granted."""
    from kvpipe.engine import aot

    target = find_target(name, EngineConfig())
    assert len(aot._devices(target.name)) == target.devices


def test_prefill_and_decode_compile_with_the_engines_own_paddings(
    compiled: tuple[Program, ...],
) -> None:
    prefill, decode = compiled
    assert (prefill.name, prefill.requests, prefill.tokens) == ("prefill", 2, 128)
    assert (decode.name, decode.requests, decode.tokens) == ("decode", 1, 1)
    assert prefill.code_bytes > 100_000
    assert decode.code_bytes > 100_000


def test_a_plan_with_compiled_steps_has_their_code_from_the_first_generate_on(
    plan: Finished, compiled: tuple[Program, ...]
) -> None:
    assert plan.exit_code == 0, plan.stderr
    phases = {phase["name"]: phase["pools"] for phase in plan.end["phases"]}
    assert "program" not in phases["sglang_param_dict_ready"]
    code = DEVICES * sum(program.code_bytes for program in compiled)
    assert phases["weights_swapped_from_mllm"]["program"] == code
    assert phases["after_drop_param_dict2"]["program"] == code


def test_another_capacity_or_prompt_is_another_program(
    compiled: tuple[Program, ...], plan: Finished, model_dir: Path
) -> None:
    from kvpipe.engine import aot, program_cache

    asked: list[Any] = []
    cache = plan.cwd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_steps", lambda *args: asked.append(args) or ())
        config = replace(engine_config(), max_total_tokens=512)
        program_cache.compiled(config, model_dir, TARGET, 100, cache)
        program_cache.compiled(engine_config(), model_dir, TARGET, 20, cache)
        program_cache.compiled(engine_config(), model_dir, "v6e:2x2x1", 100, cache)
    assert len(asked) == 3


def test_a_page_table_beyond_scalar_memory_is_a_finding_with_advice(
    four_devices: None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own limit keeps from it; without that limit the compiler says no."""
    from kvpipe.engine import aot, compat

    with compat.pytree_registered_twice():
        from sgl_jax.srt.layers.attention.flashattention_backend import FlashAttention

    many = staticmethod(lambda context_len, page_size: 512)
    monkeypatch.setattr(FlashAttention, "get_max_running_reqests", many)
    config = replace(
        engine_config(),
        context_length=2048,
        max_running_requests=512,
        max_prefill_tokens=1024,
        max_total_tokens=4096,
    )
    with pytest.raises(aot.CompileFinding) as caught:
        aot.compile_steps(config, model_dir, TARGET, 100)
    assert "the prefill step of 512 requests" in str(caught.value)
    assert f"does not compile for {KIND}: RESOURCE_EXHAUSTED" in str(caught.value)
    assert "a larger engine.page_size" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_chip_that_the_engines_kernel_does_not_know_is_a_finding(
    four_devices: None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD's refuses TPU v4 with these words."""
    from kvpipe.engine import aot, compat

    with compat.pytree_registered_twice():
        from sgl_jax.srt.layers.attention.flashattention_backend import FlashAttention

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("Unsupported tpu_version=4.")

    monkeypatch.setattr(FlashAttention, "__call__", unknown)
    with pytest.raises(aot.CompileFinding) as caught:
        aot.compile_steps(engine_config(), model_dir, TARGET, 100)
    expected = f"the engine's kernels are not made for {KIND}: Unsupported tpu_version=4."
    assert str(caught.value) == expected
