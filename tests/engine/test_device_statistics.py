"""The probe where the backend counts bytes itself, on the statistics that a TPU has given.

A CPU has none. These are the sums over the 4 devices of a v4-8 at the checkpoints of a measured run
(Qwen2.5-3B, 131072 tokens of KV cache, the devices alike); the arrays are shapes of its sizes.
"""

from typing import Any

import pytest

PARAMS, KV = 6_248_972_288, 9_663_750_144
# checkpoint → (bytes in use, what the engine and kvpipe held)
MEASURED = {
    "engine_ready_dummy": (15_912_880_128, ("params", "kv")),
    "flush_cache_before_kv_drop": (16_244_695_040, ("params", "kv")),
    "kv_cache_dropped": (6_580_944_896, ("params",)),
    "sglang_param_dict2_ready": (12_829_917_184, ("params", "slot:second")),
    "kv_cache_rebuilt": (22_493_880_320, ("params", "kv", "slot:second")),
    "after_drop_param_dict2": (16_244_908_032, ("params", "kv")),
}
SIZES = {"params": PARAMS, "kv": KV, "slot:second": PARAMS}


@pytest.fixture
def at_checkpoint(four_devices: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the devices be as they were at a checkpoint; returns the arrays by pool."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kvpipe.engine import memory

    devices = jax.local_devices()
    mesh = Mesh(devices, ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))

    def go_to(checkpoint: str) -> dict[str, list[Any]]:
        in_use, pools = MEASURED[checkpoint]
        held = {
            pool: [jax.ShapeDtypeStruct((SIZES[pool],), "uint8", sharding=sharding)]
            for pool in pools
        }
        alive = [array for arrays in held.values() for array in arrays]
        stats = {"bytes_in_use": in_use // 4, "pool": "HBM"}
        monkeypatch.setattr(memory, "live_arrays", lambda collect=True: alive)
        monkeypatch.setattr(jax, "local_devices", lambda: [_Counting(d, stats) for d in devices])
        return held

    return go_to


class _Counting:
    """A device whose backend counts bytes; to arrays that are on the device it is the same."""

    platform = "cpu"  # it gives an array what that asks for, as those devices gave these

    def __init__(self, device: Any, stats: dict[str, Any]) -> None:
        self._device = device
        self._stats = stats

    def __eq__(self, other: object) -> bool:
        return other == self._device

    def __hash__(self) -> int:
        return hash(self._device)

    def memory_stats(self) -> dict[str, Any]:
        return self._stats


def ledger_at(at_checkpoint: Any, checkpoint: str) -> Any:
    from kvpipe.engine import memory

    held = at_checkpoint(checkpoint)
    slots = {"second": held["slot:second"]} if "slot:second" in held else {}
    return memory.measure(held["params"], held.get("kv", ()), slots)[0]


def test_what_the_devices_count_beyond_the_arrays_is_the_programs_and_stays_through_a_drop(
    at_checkpoint: Any,
) -> None:
    found = {name: ledger_at(at_checkpoint, name) for name in MEASURED}
    programs = {name: ledger.of("program")[0] for name, ledger in found.items()}
    assert programs == {
        "engine_ready_dummy": 39_424,
        "flush_cache_before_kv_drop": 82_993_152,
        "kv_cache_dropped": 82_993_152,
        "sglang_param_dict2_ready": 82_993_152,
        "kv_cache_rebuilt": 83_046_400,  # the rebuild's own program
        "after_drop_param_dict2": 83_046_400,
    }
    for name, ledger in found.items():
        in_use, pools = MEASURED[name]
        assert {*ledger.pools} == {*pools, "program"}
        assert ledger.total_bytes == in_use
        assert len(set(ledger.per_device)) == 1


def test_a_drop_and_a_second_set_change_the_devices_own_count_by_exactly_their_bytes(
    at_checkpoint: Any,
) -> None:
    from kvpipe.engine import memory

    def in_use(checkpoint: str) -> int:
        at_checkpoint(checkpoint)
        return sum(memory.bytes_in_use())

    dropped = in_use("kv_cache_dropped")
    assert in_use("flush_cache_before_kv_drop") - dropped == KV
    assert in_use("sglang_param_dict2_ready") - dropped == PARAMS


def test_the_record_says_that_the_devices_counted_and_sums_what_each_of_them_has(
    at_checkpoint: Any,
) -> None:
    from kvpipe.config.schema import Kvpipe
    from kvpipe.pipeline.context import WorkerContext
    from kvpipe.worker import measurement

    held = at_checkpoint("sglang_param_dict2_ready")
    ctx = WorkerContext(Kvpipe(), "Hello", jax_ready=True)
    ctx.slots = {"first": {"all": held["params"][0]}, "second": {"all": held["slot:second"][0]}}
    measured = measurement.measure(ctx)
    assert measured.memory.bytes_in_use_source == "device"
    summary = measured.memory.jax_device_memory_summary
    assert summary["bytes_in_use_sum"] == MEASURED["sglang_param_dict2_ready"][0]
    assert summary["bytes_in_use_max"] == summary["bytes_in_use_min"] == 3_207_479_296
    assert measured.memory.jax_device_memory_stats == [{"bytes_in_use": 3_207_479_296}] * 4
    assert measured.ledger and measured.ledger.sum_of("slot:first") == PARAMS


def test_where_no_device_counts_the_size_of_each_buffer_confirms_the_count(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan and ledger take sizes from shapes and shardings; a mistake there is in both."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kvpipe.engine import memory
    from kvpipe.errors import EngineError

    sharding = NamedSharding(Mesh(jax.local_devices(), ("tensor",)), PartitionSpec())
    replicated = jax.device_put(jnp.zeros((8, 4)), sharding)
    ledger, _ = memory.measure([replicated], (), {})
    assert ledger.of("params") == (128,) * 4
    monkeypatch.setattr(memory, "shard_bytes", lambda array: array.nbytes // 4)
    with pytest.raises(EngineError, match=r"\(8, 4\), float32, .* 128 bytes .* buffers have 512"):
        memory.check_sizes([[replicated]])
    with pytest.raises(EngineError, match="bytes over its devices, but its buffers have"):
        memory.measure([replicated], (), {})
