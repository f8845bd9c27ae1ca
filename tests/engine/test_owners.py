"""Every live array has an owner: what the engine holds besides its pools is named, the rest is found."""

import gc
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import greedy

pytestmark = pytest.mark.slow

MADE = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 3)), max_size=5)


@pytest.mark.usefixtures("four_devices")
@given(MADE)
def test_an_array_with_its_views_and_shards_is_one_buffer(made: Any) -> None:
    """Made are arrays, sharded or not, with shards read or not, and with views."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kvpipe.engine import memory

    mesh = Mesh(jax.devices(), ("x",))
    arrays: list[Any] = []
    for sharded, read, length in made:
        spec = NamedSharding(mesh, PartitionSpec("x" if sharded else None))
        array = jax.device_put(np.arange(4.0 * length), spec if sharded or read else None)
        arrays.append(array)
        arrays += [shard.data for shard in array.addressable_shards] if read else [array]
    groups = memory.by_buffer({id(array): array for array in reversed(arrays)}.values())
    assert len(groups) == len(made)
    expected = sum(
        8 * length * (1 if sharded or not read else len(jax.devices())) * 2
        for sharded, read, length in made
    )
    assert sum(memory.bytes_of([group[0] for group in groups])) == expected


def measured(engine: Any, owners: Any) -> tuple[dict[str, int], list[Any]]:
    from kvpipe.engine import kv_cache, memory, params

    pools = params.parameters(engine).values(), kv_cache.buffers(engine)
    return owners.attribute(memory.measure(*pools, {})[1])


def test_what_the_engine_holds_is_named_and_four_bytes_more_are_reported_with_their_referrer(
    real_engine: Any,
) -> None:
    import jax.numpy as jnp

    from kvpipe.engine import owners

    engine = real_engine
    named = owners.Owners.when_ready(engine)
    assert "scheduler.tp_worker.future_token_ids_map" in named.sizes
    engine.generate("Hello", greedy(3))
    held, unowned = measured(engine, named)
    assert held.keys() == {*named.sizes, owners.LAST_BATCH}
    assert unowned == []
    engine.generate("Hello you", greedy(4))
    assert measured(engine, named)[1] == []
    # From bd09a87 on a module has the zeros that mean no penalty, for each shape of a batch.
    cache = "sgl_jax.srt.sampling.sampling_batch_info.cache_of_a_later_version"
    module: Any = sys.modules[cache.rpartition(".")[0]]
    module.cache_of_a_later_version = {(4, 512): jnp.zeros(3, jnp.float32)}
    try:
        held, unowned = measured(engine, named)
    finally:
        del module.cache_of_a_later_version
    assert (held[cache], unowned) == (12, [])
    engine.runner.leaked = jnp.zeros(1, jnp.float32)
    try:
        _, unowned = measured(engine, named)
        (described,) = owners.describe(unowned)
    finally:
        del engine.runner.leaked
    assert "float32[1], 4 bytes" in described
    assert "ModelRunner.leaked" in described


@pytest.mark.usefixtures("four_devices")
def test_an_array_is_looked_for_where_such_arrays_were_and_named_only_while_it_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import jax.numpy as jnp

    from kvpipe.engine import owners

    parts: dict[str, Any] = {name: SimpleNamespace() for name in ("runner", "scheduler", "engine")}
    engine: Any = SimpleNamespace(**parts)
    monkeypatch.setattr(owners, "_is_ours", lambda thing: False)
    walked: list[int] = []
    walk = owners._held_by
    monkeypatch.setattr(
        owners, "_held_by", lambda at, arrays: walked.append(len(arrays)) or walk(at, arrays)
    )
    named, first, second = owners.Owners(engine), jnp.zeros(3), jnp.ones(3)

    def found(*groups: list[Any]) -> tuple[list[str], list[int]]:
        walked.clear()
        names, _ = named._held(groups)
        return [names.get(id(group[0]), "") for group in groups], list(walked)

    engine.runner.tables = {"first": [first]}
    assert found([first]) == (["runner.tables['first'][0]"], [1])
    assert found([first]) == (["runner.tables['first'][0]"], [0]), "it was looked for everywhere"
    engine.runner.tables["first"][0] = second
    assert found([second], [first]) == (["runner.tables['first'][0]", ""], [1])
    engine.scheduler.moved = engine.runner.tables.pop("first")
    assert found([second]) == (["scheduler.moved[0]"], [1])
    assert found([second, first]) == (["scheduler.moved[0]"], [0]), "one of a buffer suffices"


@pytest.mark.usefixtures("four_devices")
def test_an_array_that_only_garbage_holds_is_collected_before_it_counts_as_unowned() -> None:
    import jax
    import jax.numpy as jnp

    from kvpipe.config.schema import Kvpipe
    from kvpipe.pipeline.context import WorkerContext
    from kvpipe.worker import measurement

    def left() -> list[Any]:
        return [array.shape for array in jax.live_arrays() if array.shape == (977,)]

    gc.disable()
    try:
        cycle: list[Any] = [jnp.zeros(977)]
        cycle.append(cycle)
        del cycle
        assert left() == [(977,)]
        measurement.measure(WorkerContext(Kvpipe(), "Hello", jax_ready=True))
        assert left() == []
    finally:
        gc.enable()


def test_a_second_kv_list_is_refused_with_its_size_when_the_engine_is_ready(
    real_engine: Any,
) -> None:
    from kvpipe.engine import kv_cache, owners
    from kvpipe.errors import EngineError

    size = kv_cache.nbytes(real_engine)
    real_engine.runner.draft_kv = [buffer + 0 for buffer in kv_cache.buffers(real_engine)]
    try:
        with pytest.raises(EngineError, match=rf"{size:,} bytes in runner.draft_kv\[...\], a pool"):
            owners.Owners.when_ready(real_engine)
    finally:
        del real_engine.runner.draft_kv
