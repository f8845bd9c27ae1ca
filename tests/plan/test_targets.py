import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpipe.config.schema import EngineConfig
from kvpipe.pipeline.ledger import KV, PARAMS, Size
from kvpipe.plan.fit import KvCapacity, engine_kv_bytes, fit_of
from kvpipe.plan.fold import check_order, plan_ledgers
from kvpipe.plan.targets import Target, find_target
from kvpipe.system.process_memory import host_memory_bytes
from tests.helpers_config import build, default_names
from tests.refusal import refusal

GIB = 1024**3
TPU = EngineConfig(device="tpu")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (None, Target("v4:2x2x1", 4, 32 * GIB)),
        ("v4:2x2x2", Target("v4:2x2x2", 8, 32 * GIB)),
        ("v5e:2x2", Target("v5e:2x2x1", 4, 16 * GIB)),
        ("v5p:2x2x1", Target("v5p:2x2x1", 4, 95 * GIB)),
        ("v6e:1x1x1", Target("v6e:1x1x1", 1, 32 * GIB)),
        ("v4-8", Target("v4:2x2x1", 4, 32 * GIB)),
        ("v4-32", Target("v4:2x2x4", 16, 32 * GIB)),
        ("v5p-128", Target("v5p:4x4x4", 64, 95 * GIB)),
        ("v5e-16", Target("v5e:4x4x1", 16, 16 * GIB)),
        ("v5litepod-256", Target("v5e:16x16x1", 256, 16 * GIB)),
        ("v6e-8", Target("v6e:2x4x1", 8, 32 * GIB)),
    ],
)
def test_a_target_has_the_devices_of_its_topology_and_the_published_memory_of_its_chip(
    name, target
):
    assert find_target(name, TPU) == target


def test_the_host_is_the_target_of_a_cpu_engine_and_its_devices_share_its_memory():
    expected = Target("cpu", 4, host_memory_bytes() // 4)
    assert find_target(None, EngineConfig(device="cpu", tp_size=2, dp_size=2)) == expected
    assert find_target("cpu", EngineConfig(device="cpu", virtual_devices=4)) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:2x2x1", "plan.target is 'v7:2x2x1'; did you mean 'v4:2x2x1' or "),
        *(
            (
                name,
                f"plan.target is '{name}'; valid are: cpu, v4:2x2x1, v5e:2x2x1, v5p:2x2x1, "
                "v6e:2x2x1, or an accelerator type, e.g. v5e-8",
            )
            for name in ("tpu", "gpu", "CPU")
        ),
        ("v4", "plan.target is 'v4'; write the chip and its topology, e.g. v4:2x2x1"),
        ("v4-30", "plan.target is 'v4-30'; valid are: v4-8, v4-16, v4-32, v4-64, v4-128, v4-256, "),
        ("v5litepod-3", "plan.target is 'v5litepod-3'; valid are: v5e-1, v5e-4, v5e-8, v5e-16, "),
        ("v7-8", "plan.target is 'v7-8'; valid are: cpu, v4:2x2x1, "),
        ("v4:", "write the chip and its topology"),
        ("v4:8", "write the chip and its topology"),
        ("v4:0x2x1", "write the chip and its topology"),
        ("v4:2x2x1x1", "write the chip and its topology"),
        ("v4:2X2", "write the chip and its topology"),
    ],
)
def test_a_target_that_is_none_is_refused_with_what_would_be_one(name, message):
    assert message in refusal(find_target, name, TPU)


def test_a_mesh_that_is_not_all_devices_of_the_target_is_refused_with_both_numbers():
    assert refusal(find_target, "v4:2x2x1", EngineConfig(device="cpu", tp_size=2)) == (
        "engine.tp_size × engine.dp_size is 2 × 1, but v4:2x2x1 has 4 devices; "
        "the product must be 4"
    )


def fit(hbm_bytes, params, token_bytes, page_size, tokens, fraction):
    """Return the fit of the default pipeline on one device."""
    kv_bytes = token_bytes * (tokens + page_size)
    planned = check_order(build(default_names()))
    sizes = {Size.PARAMS: (params,), Size.KV: (kv_bytes,), Size.PROGRAM: (0,)}
    ledgers = plan_ledgers(planned, sizes, devices=1)
    engine_bytes = engine_kv_bytes(hbm_bytes, params, fraction)
    return fit_of(
        planned, ledgers, hbm_bytes, KvCapacity(kv_bytes, tokens, page_size, engine_bytes)
    )


@settings(deadline=None)
@given(
    st.sampled_from(["v4:2x2x1", "v5e:2x2x1", "v5p:2x2x1", "v6e:2x2x1"]),
    st.integers(1, 20 * GIB),
    st.integers(1, 100_000),
    st.sampled_from([1, 16, 64, 128]),
    st.integers(1, 100_000),
    st.sampled_from([0.5, 0.8, 0.88, 0.95, 1.0]),
)
def test_the_largest_capacity_fits_and_one_page_more_does_not(
    name, params, token_bytes, page_size, pages, fraction
):
    hbm_bytes = find_target(name, TPU).hbm_bytes
    shape = (hbm_bytes, params, token_bytes, page_size)
    asked = fit(*shape, pages * page_size, fraction)
    most = asked.max_total_tokens
    assert asked.fits == (pages * page_size <= most)
    assert most % page_size == 0
    if most:
        assert fit(*shape, most, fraction).fits
    more = fit(*shape, most + page_size, fraction)
    assert (more.fits, more.max_total_tokens) == (False, most)


def test_a_cut_by_the_engine_binds_where_the_peak_alone_would_fit():
    """A 16 GiB device with 1 GiB of parameters; half of it is what the engine plans with."""
    token_bytes = 1024**2
    free = fit(16 * GIB, GIB, token_bytes, 1, 7 * 1024, fraction=0.5)
    assert (free.fits, free.max_total_tokens) == (True, 7 * 1024)
    cut = fit(16 * GIB, GIB, token_bytes, 1, 7 * 1024 + 1, fraction=0.5)
    assert (cut.fits, cut.max_total_tokens) == (False, 7 * 1024)
    roomy = fit(16 * GIB, GIB, token_bytes, 1, 7 * 1024 + 1, fraction=0.9)
    assert roomy.fits


def test_the_engine_plans_with_its_share_of_the_memory_less_its_parameters():
    """As ModelRunner.profile_max_num_token: free - total × (1 - fraction), where free lacks params."""
    assert engine_kv_bytes(1000, 300, 0.8) == 500
    assert engine_kv_bytes(1000, 900, 0.8) == 0


def test_a_pipeline_without_an_engine_is_never_cut():
    planned = check_order(build(["jax_ready"]))
    ledgers = plan_ledgers(
        planned, {Size.PARAMS: (1,), Size.KV: (1,), Size.PROGRAM: (1,)}, devices=1
    )
    assert ledgers[0].of(PARAMS) == ledgers[0].of(KV) == (0,)
    assert fit_of(planned, ledgers, 10, KvCapacity(100, 99, 1, engine_bytes=0)).fits
