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
from tests.helpers_config import compose_plain, config_of

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
    from kvpipe.engine import aot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_steps", lambda *args: pytest.fail("it was compiled again"))
        place = aot.Place(engine_config(), model_dir, TARGET, plan.cwd, compiles=True)
        return aot.engine_steps(place, 100)


@pytest.mark.parametrize(
    "name", ["v5e-1", "v6e-1", "v5e:1x2", "v4:2x1x1", "v5e:3x2", *ACCELERATORS]
)
def test_libtpu_describes_every_target_that_is_named_as_valid(
    four_devices: None, name: str
) -> None:
    """Those of a single chip failed: their hosts have fewer chips than libtpu takes for granted."""
    from kvpipe.engine import aot, devices

    target = find_target(name, EngineConfig())
    described = aot._devices(target.name)
    assert len(described) == target.devices
    # A run on such a machine finds what was compiled for the target by this name.
    assert devices.name_of(described) == target.name


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
    named = {program["name"]: program for program in plan.end["programs"]}
    assert sorted(named) == ["decode", "kv_zeros", "prefill", "weight_digest"]
    assert named["kv_zeros"]["temp_bytes"] == 0
    assert named["weight_digest"]["code_bytes"] > 100_000
    code = DEVICES * sum(program["code_bytes"] for program in named.values())
    assert code > DEVICES * sum(program.code_bytes for program in compiled)
    assert phases["weights_swapped_from_mllm"]["program"] == code
    assert phases["after_drop_param_dict2"]["program"] == code


def test_another_capacity_or_prompt_is_another_program(
    compiled: tuple[Program, ...], plan: Finished, model_dir: Path
) -> None:
    from kvpipe.engine import aot

    asked: list[Any] = []
    place = aot.Place(engine_config(), model_dir, TARGET, plan.cwd, compiles=True)
    others = [
        (replace(place, config=replace(place.config, max_total_tokens=512)), 100),
        (place, 20),
        (replace(place, target="v6e:2x2x1"), 100),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "compile_steps", lambda *args: asked.append(args) or ())
        for other, _ in others:
            assert aot.engine_steps(replace(other, compiles=False), 21) == ()
        assert asked == []
        for other, tokens in others:
            aot.engine_steps(other, tokens)
    assert len(asked) == 3


@pytest.mark.nightly(finds="a refusal of the TPU's compiler that is reported without its advice")
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
        aot.compile_steps(aot.Place(config, model_dir, TARGET, Path(), compiles=True), 100)
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
        aot.compile_steps(aot.Place(engine_config(), model_dir, TARGET, Path(), True), 100)
    expected = f"the engine's kernels do not support {KIND}: Unsupported tpu_version=4."
    assert str(caught.value) == expected


# Bytes asked for and given, as libtpu 0.0.32 says it and a user saw it on a TPU (jax issue 1491).
GIVEN = [
    ((128,), "bfloat16", 512),
    ((64,), "bfloat16", 512),
    ((1,), "float32", 512),
    ((2048,), "bfloat16", 4096),
    ((4097, 6, 128), "bfloat16", 6_292_992 + 10_752),
]


def test_a_tpu_gives_small_arrays_whole_tiles_and_each_size_is_compiled_once(
    four_devices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from kvpipe.engine import aot, physical

    monkeypatch.setattr(physical, "_sizes", {})
    device, here = aot.described_device(TARGET), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype, _ in GIVEN]
    with physical.kept_in(tmp_path):
        sizes = [physical.shard_bytes(array, device) for array in arrays]
    assert sizes == [given for *_, given in GIVEN]
    physical._sizes.clear()
    monkeypatch.setattr(jax, "jit", lambda *args, **more: pytest.fail("it was compiled again"))
    with physical.kept_in(tmp_path):
        assert [physical.shard_bytes(array, device) for array in arrays] == sizes


def test_kvpipes_own_programs_write_into_the_kv_cache_in_place(
    four_devices: None, model_dir: Path, tmp_path: Path
) -> None:
    from kvpipe.engine import aot

    place = aot.Place(engine_config(), model_dir, TARGET, tmp_path, compiles=True)
    take, put, zeros = aot.kv_programs(place, ["kv_take", "kv_put", "kv_zeros"])
    kv_bytes = (1024 + 1) * 2 * 128 * 2
    block_bytes = 1024 * 2 * 128 * 2
    assert put.in_place_bytes == kv_bytes
    assert (zeros.in_place_bytes, zeros.temp_bytes, take.in_place_bytes) == (0, 0, 0)
    assert block_bytes <= take.temp_bytes <= block_bytes + 4096
    assert block_bytes <= put.temp_bytes <= block_bytes + 4096
    assert put == aot.kv_programs(place, ["kv_take", "kv_put", "kv_zeros"])[1]


def test_the_digest_of_a_large_parameter_copies_no_part_of_it_on_a_tpu(four_devices: None) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kvpipe.engine import aot, digests

    mesh = Mesh(aot._devices(TARGET), ("tensor",))
    shape = (16384, 2048)
    rule = digests.rule_of("model.embed_tokens.weight", shape, digests.Heads(4, 2, 128, 128))
    held = NamedSharding(mesh, PartitionSpec())
    param = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=held)
    (program,) = digests.lowered({"embedding": rule}, {"embedding": param})
    used: Any = program.compile().memory_analysis()
    assert used.argument_size_in_bytes > 16384 * 2048 * 2
    assert used.temp_size_in_bytes == 0


def test_a_program_of_kvpipes_own_that_copies_the_cache_is_a_finding(
    four_devices: None, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from kvpipe.engine import aot, kv_cache

    kv_cache._putter.cache_clear()
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda *args, donate_argnums=(), **more: jit(*args, **more))
    place = aot.Place(engine_config(), model_dir, TARGET, tmp_path, compiles=True)
    with pytest.raises(aot.CompileFinding, match=r"kv_put is not in place on .*updates 0 in place"):
        aot.kv_programs(place, ["kv_put"])
    kv_cache._putter.cache_clear()


def test_a_cpu_whose_memory_the_temporaries_exceed_is_refused_and_one_with_plenty_compiles_nothing(
    four_devices: None, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux killed such a run in its first generate: native attention and float32 take copies."""
    from kvpipe.engine import devices
    from kvpipe.pipeline.steps import build_steps
    from kvpipe.plan.fit import why_not_fit
    from kvpipe.plan.fold import check_order
    from kvpipe.records.run import RunPlanned
    from kvpipe.worker import planner

    overrides = [f"engine.{name}={value}" for name, value in SMALL_ENGINE.items()]
    config = config_of(compose_plain(*overrides, f"cache_dir={tmp_path}"))
    planned = check_order(build_steps(config))

    def plan(device_bytes: int, wanted: Any) -> RunPlanned:
        monkeypatch.setattr(devices, "memory_bytes", lambda: device_bytes)
        asked = replace(config, plan=replace(config.plan, compile=wanted))
        return planner.plan_here(planned, asked, model_dir).record

    plenty = plan(1 << 34, "auto")
    assert (plenty.programs, plenty.fit.fits) == ((), True)
    peak = plenty.peak.max_device_bytes
    little = plan(peak * 3 // 2, "auto")
    assert [p.name for p in little.programs] == ["prefill", "decode", "kv_zeros", "weight_digest"]
    # Compiled code is no device memory of a CPU.
    assert tuple(replace(phase, temp_bytes=0) for phase in little.phases) == plenty.phases
    needing = [phase.name for phase in little.phases if phase.temp_bytes]
    assert needing[0] == "engine_ready_dummy"  # before it nothing runs a program
    assert "sglang_param_dict2_ready" not in needing  # nor does the engine without a KV cache
    assert little.fit.temp_bytes > peak // 2
    assert f"{little.fit.temp_bytes} of them for temporaries" in str(why_not_fit(little))
    assert plan(1 << 34, "auto").programs == little.programs  # an earlier plan compiled them
    assert plan(peak * 3 // 2, False).programs == ()
