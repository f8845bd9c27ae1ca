"""Weights in a live engine: the right ids, the very arrays, no recompilation, no wrong set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.mllm import hf_weights, tree_from_checkpoint
from kvpipe.checkpoints.safetensors import Tensors
from kvpipe.errors import EngineError
from tests.conftest import StartEngine, greedy
from tests.golden.answers import golden

PROMPTS = [answer["prompt"] for answer in golden("tiny_float32")["answers"]]


def path_of(engine: Any, ending: str) -> str:
    """Return the one parameter path that ends so; the first part differs between versions."""
    from kvpipe.engine import weights

    (found,) = [path for path in weights.parameters(engine) if path.partition(".")[2] == ending]
    return found


@pytest.fixture
def compilations() -> Any:
    """A function that returns the number of compilations since it was called last."""
    from kvpipe.engine.compile_count import CompileCounter

    counter = CompileCounter()
    counter.take()
    return counter.take


@pytest.mark.nightly(finds="ids of another model that the digests and transformers' ids let pass")
def test_swapped_weights_give_the_ids_of_an_engine_that_loaded_the_checkpoint_itself(
    real_engine: Any, start_engine: StartEngine, tiny_dir: Path
) -> None:
    from kvpipe.engine import weights

    with start_engine(tiny_dir, load_format="auto") as loaded:
        weights.take_digests(loaded)
        digest = loaded.proof.whole
        expected = [loaded.generate(prompt, greedy(8)).token_ids for prompt in PROMPTS]
    assert real_engine.proof.whole == digest
    found = [real_engine.generate(prompt, greedy(8)).token_ids for prompt in PROMPTS]
    assert found == expected
    assert {len(ids) for ids in found} == {8}


def test_the_mllm_tree_gives_the_same_parameter_set_as_the_files(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import weights

    from_tree = weights.build(real_engine, hf_weights(tree_from_checkpoint(tiny_weights)))
    current = weights.parameters(real_engine)
    assert from_tree.keys() == current.keys()
    for path, array in from_tree.items():
        assert np.array_equal(np.asarray(array), np.asarray(current[path])), path


def test_a_swap_compiles_nothing_and_changes_the_output_back_and_forth(
    real_engine: Any, tiny_weights: Tensors, compilations: Any
) -> None:
    from kvpipe.engine import weights

    real_ids = real_engine.generate("Hello", greedy(8)).token_ids
    real_engine.flush()
    real = weights.parameters(real_engine)
    zeroed = {name: np.zeros_like(value) for name, value in tiny_weights.items()}
    zeros = weights.build(real_engine, zeroed)
    compilations()
    weights.swap(real_engine, zeros)
    zero_ids = real_engine.generate("Hello", greedy(8)).token_ids
    real_engine.flush()
    weights.swap(real_engine, real)
    assert real_engine.generate("Hello", greedy(8)).token_ids == real_ids != zero_ids
    assert compilations().programs == 0


def test_after_a_swap_the_engine_computes_with_the_very_arrays_and_frees_the_old_ones(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import memory, weights

    before = sum(memory.bytes_in_use())
    new = weights.build(real_engine, tiny_weights)
    set_bytes = sum(memory.bytes_of(new.values()))
    assert sum(memory.bytes_in_use()) == before + set_bytes
    weights.swap(real_engine, new)
    assert sum(memory.bytes_in_use()) == before
    assert all(new[path] is array for path, array in weights.parameters(real_engine).items())


def test_a_swap_of_two_exchanged_layers_is_found_and_the_parameters_named(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import weights

    new = weights.build(real_engine, tiny_weights)
    one, other = (path_of(real_engine, f"layers.{i}.self_attn.o_proj.weight") for i in (0, 1))
    new[one], new[other] = new[other], new[one]
    weights.swap(real_engine, new)
    assert real_engine.proof.wrong == (one, other)
    (check,) = real_engine.proof.checks
    assert (check.expected, check.actual, check.passed) == (38, 36, False)


def test_kv_heads_are_replicated_over_the_devices(real_engine: Any) -> None:
    from kvpipe.engine import weights

    path = path_of(real_engine, "layers.0.self_attn.k_proj.weight")
    k_proj = np.asarray(weights.parameters(real_engine)[path])
    heads = k_proj.reshape(512, 4, 128).swapaxes(0, 1)
    assert np.array_equal(heads[0], heads[1])
    assert np.array_equal(heads[2], heads[3])
    assert not np.array_equal(heads[1], heads[2])


def test_weights_that_are_missing_are_refused_by_name(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import weights

    partial = {k: v for k, v in tiny_weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(EngineError, match=r"1 of 38 weights are missing.*layers\.1\.mlp\.up_proj"):
        weights.build(real_engine, partial)
    with pytest.raises(EngineError, match="38 of 38 weights are missing"):
        weights.build(real_engine, {})


def test_a_weight_of_another_shape_is_refused_by_name_and_shape(
    real_engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import weights

    name = "model.layers.0.mlp.gate_proj.weight"
    wrong = dict(tiny_weights) | {name: tiny_weights[name][:-1]}
    with pytest.raises(EngineError, match=r"gate_proj.weight' has shape \(1023, 512\)"):
        weights.build(real_engine, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, path: s.pop(path),
            r"lacks 1 of 38 leaves, the first is '\w+\.norm\.scale'",
        ),
        (lambda s, path: s.clear(), "lacks 38 of 38 leaves"),
        (lambda s, path: s.update(extra=s[path]), "the engine has no parameter 'extra'"),
        (lambda s, path: s.update({path: s[path][:-1]}), "has shape"),
        (lambda s, path: s.update({path: s[path].astype("float32")}), "has dtype float32"),
    ],
)
def test_a_parameter_set_that_is_not_the_engines_is_refused_and_nothing_is_swapped(
    real_engine: Any, change: Any, message: str
) -> None:
    from kvpipe.engine import weights

    before = weights.parameters(real_engine)
    wrong = dict(before)
    change(wrong, path_of(real_engine, "norm.scale"))
    with pytest.raises(EngineError, match=message):
        weights.swap(real_engine, wrong)
    assert all(before[path] is array for path, array in weights.parameters(real_engine).items())


def test_a_parameter_in_another_sharding_is_refused(real_engine: Any) -> None:
    import jax

    from kvpipe.engine import weights

    path = path_of(real_engine, "norm.scale")
    wrong = weights.parameters(real_engine)
    wrong[path] = jax.device_put(wrong[path], jax.devices()[0])
    with pytest.raises(EngineError, match="has sharding SingleDeviceSharding"):
        weights.swap(real_engine, wrong)
