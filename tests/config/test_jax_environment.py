import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.config.jax_environment import check_mesh, jax_environment
from kvpipe.config.schema import EngineConfig
from tests.refusal import refusal

COUNT = "--xla_force_host_platform_device_count"
MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"
    "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1099511627776"
)


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({}, 1),
        ({"tp_size": 4}, 4),
        ({"tp_size": 2, "dp_size": 3}, 6),
        ({"dp_size": 3}, 3),
        ({"virtual_devices": 4}, 4),
        ({"virtual_devices": 4, "tp_size": 4}, 4),
        ({"virtual_devices": 4, "dp_size": 2}, 4),
        ({"virtual_devices": 4, "tp_size": 2, "dp_size": 2}, 4),
    ],
)
def test_the_cpu_gets_as_many_virtual_devices_as_the_mesh_takes(options, devices):
    assert jax_environment(EngineConfig(device="cpu", **options), {}) == {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COUNT}={devices}",
        "GLIBC_TUNABLES": MEMORY,
    }


def test_each_of_several_hosts_gets_its_part_of_the_virtual_devices_and_gloo():
    for options in ({"tp_size": 4}, {"virtual_devices": 4}, {}):
        engine = EngineConfig(device="cpu", nnodes=2, **options)
        assert jax_environment(engine, {}) == {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{COUNT}={2 if options else 1}",
            "GLIBC_TUNABLES": MEMORY,
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_ENABLE_PREEMPTION_SERVICE": "false",
            "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
        }


def test_inherited_xla_flags_are_kept_and_the_count_comes_last_so_that_it_wins():
    environ = {"XLA_FLAGS": f"--xla_dump_to=/tmp/x {COUNT}=8", "GLIBC_TUNABLES": "a.b=1"}
    variables = jax_environment(EngineConfig(device="cpu", tp_size=2), environ)
    assert variables["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x {COUNT}=8 {COUNT}=2"
    assert variables["GLIBC_TUNABLES"] == f"a.b=1:{MEMORY}"


def test_a_tpu_gets_no_flags_for_the_cpu():
    variables = jax_environment(EngineConfig(device="tpu"), {"XLA_FLAGS": "--xla_dump_to=/tmp/x"})
    assert variables == {"JAX_PLATFORMS": "tpu"}


@pytest.mark.parametrize("inherited", ["", "cpu"])
def test_an_inherited_platform_that_is_empty_or_the_same_is_accepted(inherited):
    variables = jax_environment(EngineConfig(device="cpu"), {"JAX_PLATFORMS": inherited})
    assert variables["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(("device", "inherited"), [("cpu", "tpu"), ("tpu", "cpu"), ("tpu", "cuda")])
def test_another_inherited_platform_is_refused_with_both_and_the_way_out(device, inherited):
    engine = EngineConfig(device=device)
    assert refusal(jax_environment, engine, {"JAX_PLATFORMS": inherited}) == (
        f"engine.device is '{device}', but the environment has JAX_PLATFORMS={inherited}; "
        f"unset it or set it to {device}"
    )


def test_a_mesh_that_does_not_take_all_virtual_devices_is_refused_with_the_product():
    assert refusal(check_mesh, EngineConfig(device="cpu", virtual_devices=4, tp_size=2)) == (
        "engine.tp_size × engine.dp_size is 2 × 1 = 2, but engine.virtual_devices is 4; "
        "they must be equal"
    )


def test_a_dp_size_that_does_not_divide_the_virtual_devices_is_refused():
    assert refusal(check_mesh, EngineConfig(device="cpu", virtual_devices=4, dp_size=3)) == (
        "engine.tp_size × engine.dp_size is 1 × 3 = 3, but engine.virtual_devices is 4; "
        "they must be equal"
    )


def test_a_tpu_with_virtual_devices_is_refused():
    assert refusal(check_mesh, EngineConfig(device="tpu", virtual_devices=4)) == (
        "engine.virtual_devices is 4, but engine.device is 'tpu'; only the cpu has virtual devices"
    )


sizes = st.integers(1, 16)


@given(tp_size=st.none() | sizes, dp_size=sizes, virtual=st.none() | sizes)
def test_a_cpu_mesh_is_refused_exactly_if_it_is_not_the_virtual_devices(tp_size, dp_size, virtual):
    engine = EngineConfig(device="cpu", tp_size=tp_size, dp_size=dp_size, virtual_devices=virtual)
    fits = virtual is None or (
        virtual % dp_size == 0 if tp_size is None else tp_size * dp_size == virtual
    )
    if not fits:
        assert refusal(check_mesh, engine).startswith("engine.tp_size × engine.dp_size is ")
        return
    count = int(jax_environment(engine, {})["XLA_FLAGS"].removeprefix(f"{COUNT}="))
    assert count == (virtual or (tp_size or 1) * dp_size)
