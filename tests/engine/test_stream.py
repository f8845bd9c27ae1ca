"""Weights streamed into a live engine and put aside: one set at any time, the right ids, no crash."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvpipe.checkpoints.mllm import hf_weights, tree_from_checkpoint
from kvpipe.checkpoints.safetensors import Tensors, open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.errors import EngineError
from tests.conftest import greedy

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def other_weights(model_cache: Any) -> Tensors:
    """Weights of the same shapes with other values."""
    return open_checkpoint(ensure(TinyModel(seed=1), model_cache))


def ids(engine: Any, tokens: int = 8) -> tuple[int, ...]:
    return engine.generate("Hello", greedy(tokens)).token_ids


def test_weights_swapped_in_and_back_give_the_first_ids_and_nothing_is_compiled_or_flushed_by_hand(
    real_engine: Any, tiny_weights: Tensors, other_weights: Tensors
) -> None:
    from kvpipe.engine import memory, weights
    from kvpipe.engine.compile_count import CompileCounter

    prompt = "The KV cache is dropped and rebuilt."
    first = real_engine.generate(prompt, greedy(8)).token_ids
    assert real_engine.generate(prompt, greedy(8)).cached_tokens > 0
    in_use = sum(memory.bytes_in_use())
    compilations = CompileCounter()
    compilations.take()
    found = []
    for given in (other_weights, hf_weights(tree_from_checkpoint(tiny_weights))):
        change = weights.stream(real_engine, given)
        assert (change.changed_bytes, change.fields["num_params"]) == (0, 38)
        assert sum(memory.bytes_in_use()) == in_use
        output = real_engine.generate(prompt, greedy(8))
        assert output.cached_tokens == 0
        found.append(output.token_ids)
    assert found[1] == first != found[0]
    assert compilations.take().programs == 0


def test_a_streamed_set_is_bit_for_bit_the_one_that_is_built(
    real_engine: Any, tiny_weights: Tensors, other_weights: Tensors
) -> None:
    from kvpipe.engine import weights

    built = weights.build(real_engine, other_weights)
    weights.stream(real_engine, other_weights)
    for path, array in weights.parameters(real_engine).items():
        assert array.sharding == built[path].sharding
        assert np.asarray(array).tobytes() == np.asarray(built[path]).tobytes(), path


def test_while_weights_are_streamed_the_devices_never_hold_more_than_one_set(
    real_engine: Any, other_weights: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from kvpipe.engine import memory, transfer, weights

    memory.collect_garbage()
    whole = sum(memory.bytes_of(jax.live_arrays()))
    held: list[int] = []
    begin = transfer.begin

    def watched(host: Any, like: Any) -> Any:
        placing = begin(host, like)
        for shard in placing.shards:
            shard.result()
        held.append(sum(memory.bytes_of(jax.live_arrays())))
        return placing

    monkeypatch.setattr(transfer, "begin", watched)
    weights.stream(real_engine, other_weights)
    assert len(held) == 38
    assert max(held) <= whole


def without(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in weights.items() if name != NAME}


def with_value(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(weights: dict[str, Any]) -> dict[str, Any]:
        wrong = np.array(weights[NAME], ml_dtypes.bfloat16)
        wrong[-1, -1] = value
        return weights | {NAME: wrong}

    return change


@pytest.mark.parametrize("way", ["stream", "build"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, rf"1 of 38 weights are missing: '{NAME}'"),
        (lambda w: {}, "38 of 38 weights are missing"),
        (lambda w: w | {"model.extra.weight": w[NAME]}, "not the engine's: 'model.extra.weight'"),
        (lambda w: w | {NAME: w[NAME][:-1]}, rf"'{NAME}' has shape \(1023, 512\)"),
        (lambda w: w | {NAME: w[NAME].view(np.int16)}, rf"'{NAME}' has dtype int16"),
        (with_value(np.nan), rf"not finite: '{NAME}'"),
        (with_value(-np.inf), rf"not finite: '{NAME}'"),
    ],
)
def test_weights_that_are_refused_leave_the_engine_its_old_arrays_and_its_prefix_cache(
    real_engine: Any, other_weights: Tensors, way: str, change: Any, message: str
) -> None:
    from kvpipe.engine import weights

    prompt = "The KV cache is dropped and rebuilt."
    before = weights.parameters(real_engine)
    output = real_engine.generate(prompt, greedy(2))
    with pytest.raises(EngineError, match=message):
        getattr(weights, way)(real_engine, change(dict(other_weights)))
    assert all(before[path] is leaf for path, leaf in weights.parameters(real_engine).items())
    again = real_engine.generate(prompt, greedy(2))
    assert again.token_ids == output.token_ids
    assert again.cached_tokens > 0


def test_a_swap_that_breaks_off_makes_the_engine_refuse_until_the_next_one(
    real_engine: Any, tiny_weights: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine import memory, transfer, weights

    first, whole = ids(real_engine), sum(memory.bytes_in_use())
    begin, begun = transfer.begin, []

    def full(host: Any, like: Any) -> Any:
        begun.append(like)
        if len(begun) > 5:
            raise MemoryError("the device is full")
        return begin(host, like)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "begin", full)
        with pytest.raises(MemoryError, match="the device is full"):
            weights.stream(real_engine, tiny_weights)
    with pytest.raises(EngineError, match="its weights are incomplete"):
        ids(real_engine)
    weights.stream(real_engine, tiny_weights)
    assert ids(real_engine) == first
    real_engine.flush()
    assert sum(memory.bytes_in_use()) == whole


def test_offloaded_weights_free_their_bytes_and_come_back_with_the_same_ids_and_prefixes(
    real_engine: Any,
) -> None:
    from kvpipe.engine import memory, transfer, weights
    from kvpipe.engine.compile_count import CompileCounter

    prompt = "The KV cache is dropped and rebuilt."
    first, proof = real_engine.generate(prompt, greedy(8)), real_engine.proof
    set_bytes, in_use = weights.live_bytes(real_engine), sum(memory.bytes_in_use())
    compilations = CompileCounter()
    compilations.take()
    gone, kept = weights.offload(real_engine)
    assert gone.freed_bytes == gone.nbytes == set_bytes
    assert sum(memory.bytes_in_use()) == in_use - set_bytes
    assert weights.live_bytes(real_engine) == 0
    assert (
        0 < transfer.host_bytes(kept.values()) < set_bytes
    )  # what the devices replicate is kept once
    with pytest.raises(EngineError, match="cannot generate: its weights are offloaded"):
        ids(real_engine)
    with pytest.raises(EngineError, match="the weights are not there: its weights are offloaded"):
        weights.offload(real_engine)
    back = weights.restore(real_engine, kept)
    assert back.changed_bytes == back.nbytes == set_bytes
    assert not kept
    again = real_engine.generate(prompt, greedy(8))
    assert again.token_ids == first.token_ids
    assert again.cached_tokens > 0
    assert compilations.take().programs == 0
    assert proof.proven and real_engine.proof == proof
    with pytest.raises(EngineError, match="the weights are there"):
        weights.restore(real_engine, kept)


def test_a_value_that_changes_while_weights_are_offloaded_is_found_and_its_parameter_named(
    real_engine: Any,
) -> None:
    from kvpipe.engine import weights

    digest = real_engine.proof.whole
    _, kept = weights.offload(real_engine)
    path = next(path for path in kept if path.endswith("layers.2.self_attn.v_proj.weight"))
    list(kept[path].values())[-1][-1, -1] += 1
    weights.restore(real_engine, kept)
    assert real_engine.proof.wrong == (path,)
    assert real_engine.proof.whole == f"wrong-{digest}"  # the second copy of a repeated head


def test_after_a_drop_of_the_weights_either_swap_brings_the_ids_back_and_one_set_is_enough(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import memory, weights

    first, whole = ids(real_engine), sum(memory.bytes_in_use())
    set_bytes = weights.live_bytes(real_engine)
    for way in ("stream", "swap"):
        real_engine.flush()
        assert weights.drop(real_engine).changed_bytes == -set_bytes
        with pytest.raises(EngineError, match="cannot generate: its weights are dropped"):
            ids(real_engine)
        with pytest.raises(EngineError, match="the weights are not there"):
            weights.drop(real_engine)
        if way == "stream":
            assert weights.stream(real_engine, tiny_weights).changed_bytes == set_bytes
        else:
            built = weights.build(real_engine, tiny_weights)
            assert sum(memory.bytes_in_use()) == whole
            weights.swap(real_engine, built)
        assert sum(memory.bytes_in_use()) == whole
        assert ids(real_engine) == first


def test_with_weights_and_kv_cache_both_dropped_both_are_named_and_both_must_come_back(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import kv_cache, weights

    first = ids(real_engine)
    real_engine.flush()
    kv_cache.drop(real_engine)
    weights.drop(real_engine)
    with pytest.raises(EngineError, match=r"its KV cache is dropped.*; its weights are dropped"):
        ids(real_engine)
    weights.stream(real_engine, tiny_weights)
    with pytest.raises(EngineError, match="cannot generate: its KV cache is dropped"):
        ids(real_engine)
    kv_cache.rebuild(real_engine)
    assert ids(real_engine) == first
