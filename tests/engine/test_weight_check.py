"""Refusals before a swap, decided on the host alone: no engine runs here."""

import os

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpipe.checkpoints import mapped
from kvpipe.checkpoints.safetensors import open_checkpoint, write
from kvpipe.engine.digests import Heads as HeadSizes
from kvpipe.engine.digests import rule_of
from kvpipe.engine.weight_check import check_weights, is_finite
from kvpipe.engine.weight_map import EngineView, Heads, Leaf, disagreeing
from kvpipe.errors import WRONG_WEIGHTS, EngineError, WeightsError

FLOATS = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS[:2], ids=str)
def test_every_16_bit_value_is_finite_exactly_if_it_is_finite_after_the_cast(source, target):
    values = np.arange(1 << 16, dtype=np.uint16).view(source)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.isfinite(values.astype(target))
    found = [is_finite(values[i : i + 1], target) for i in range(0, 1 << 16, 7)]
    assert found == expected[::7].tolist()
    assert is_finite(values[expected], target)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, (1 << 32) - 1), st.sampled_from(FLOATS))
def test_a_32_bit_value_is_finite_exactly_if_it_is_finite_after_the_cast(bits, target):
    value = np.array([bits], np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = bool(np.isfinite(value.astype(target)).all())
    assert is_finite(value, target) == expected


@pytest.mark.parametrize("at", [0, 700_000, -1])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(at, value):
    weight = np.zeros((1000, 1024), ml_dtypes.bfloat16)
    assert is_finite(weight.T, weight.dtype)
    weight.reshape(-1)[at] = value
    assert not is_finite(weight, weight.dtype)
    assert not is_finite(weight.T, weight.dtype)


HEADS = st.builds(
    lambda heads, repeats, head_dim, padding, axis: Heads(
        axis, heads, head_dim, heads * repeats, head_dim + padding
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 1),
)


@given(HEADS, st.data())
def test_each_shard_of_a_view_is_that_shard_of_the_repeated_and_padded_weight(heads, data):
    shape = [5, 5]
    shape[heads.axis] = heads.heads * heads.head_dim
    inner = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    split = np.moveaxis(inner, heads.axis, 0).reshape(heads.heads, heads.head_dim, 5)
    wide = np.repeat(split, heads.engine_heads // heads.heads, axis=0)
    wide = np.pad(wide, ((0, 0), (0, heads.engine_head_dim - heads.head_dim), (0, 0)))
    whole = np.moveaxis(wide.reshape(-1, 5), 0, heads.axis)
    view = EngineView(inner.T, Leaf("path", "source", True, heads))
    assert view.shape == whole.shape
    first = data.draw(st.integers(0, heads.engine_heads - 1))
    last = data.draw(st.integers(first + 1, heads.engine_heads))
    part = slice(first * heads.engine_head_dim, last * heads.engine_head_dim)
    index = (part, slice(None)) if heads.axis == 0 else (slice(None), part)
    assert np.array_equal(view[index], whole[index])


def test_a_shard_that_parts_a_head_is_refused():
    view = EngineView(np.zeros((4, 2)), Leaf("p", "s", False, Heads(0, 2, 2, 4, 2)))
    with pytest.raises(EngineError, match="splits a head"):
        view[slice(0, 3), slice(None)]


LEAVES = {
    "embed": Leaf("embed", "model.embed_tokens.weight", False, None),
    "up": Leaf("up", "model.layers.0.mlp.up_proj.weight", True, None),
}
BLUEPRINT = {"embed": np.zeros((8, 4), np.float32), "up": np.zeros((4, 6), np.float32)}


def given_weights(**changed):
    weights = {
        "model.embed_tokens.weight": np.ones((8, 4), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.ones((6, 4), np.float32),
    }
    return {name: array for name, array in (weights | changed).items() if array is not None}


def test_complete_weights_are_accepted():
    check_weights(LEAVES, BLUEPRINT, given_weights())


def test_everything_that_is_wrong_with_names_and_shapes_is_listed_at_once():
    wrong = given_weights(
        **{
            "model.embed_tokens.weight": np.ones((8, 5), np.float32),
            "model.layers.0.mlp.up_proj.weight": None,
            "model.layers.0.mlp.up.weight": np.ones((6, 4), np.float32),
        }
    )
    with pytest.raises(EngineError) as caught:
        check_weights(LEAVES, BLUEPRINT, wrong)
    _, missing, unexpected, misshapen = str(caught.value).split("; ", 3)
    assert "1 of 2 weights are missing: 'model.layers.0.mlp.up_proj.weight'" in missing
    assert "1 are not the engine's: 'model.layers.0.mlp.up.weight'" in unexpected
    assert "'model.embed_tokens.weight' has shape (8, 5), which gives (8, 5)" in misshapen


def test_a_value_that_is_not_finite_is_refused_with_an_exit_code_of_its_own():
    weights = given_weights()
    weights["model.embed_tokens.weight"][7, 3] = np.nan
    with pytest.raises(WeightsError, match=r"not finite: 'model.embed_tokens.weight'") as caught:
        check_weights(LEAVES, BLUEPRINT, weights)
    assert caught.value.exit_code == WRONG_WEIGHTS


def test_weights_that_are_no_floats_are_refused():
    wrong = given_weights(**{"model.embed_tokens.weight": np.ones((8, 4), np.int8)})
    with pytest.raises(EngineError, match=r"'model.embed_tokens.weight' has dtype int8"):
        check_weights(LEAVES, BLUEPRINT, wrong)


def test_a_tied_head_that_is_written_out_is_accepted_and_another_one_refused():
    embedding = np.arange(32, dtype=np.float32).reshape(8, 4)
    tied = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.copy()}
    check_weights(LEAVES, BLUEPRINT, given_weights(**tied))
    with pytest.raises(EngineError, match=r"1 are not the engine's: 'lm_head.weight'"):
        check_weights(LEAVES, BLUEPRINT, given_weights(**{"lm_head.weight": embedding}))


def test_buffers_that_every_model_computes_itself_are_accepted():
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    check_weights(LEAVES, BLUEPRINT, given_weights(**{name: np.ones(2, np.float32)}))


def test_a_file_is_read_and_summed_once_and_again_after_it_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    norm = "model.norm.weight"
    leaves = {"p": Leaf("p", norm, False, None)}
    like = jax.ShapeDtypeStruct((8,), np.float32)
    rules = {"p": rule_of(norm, (8,), HeadSizes(1, 1, 1, 1))}

    def changed(value, second):
        write(path, {norm: np.full(8, value, np.float32)})
        assert mapped.identity(open_checkpoint(tmp_path)[norm]) is None  # written a moment ago
        os.utime(path, (second, second))
        given, again = open_checkpoint(tmp_path), open_checkpoint(tmp_path)
        assert mapped.identity(given[norm]) == mapped.identity(again[norm])
        return given

    def digest(given):
        return check_weights(leaves, {"p": like}, given, rules)

    given = changed(1, 1)
    first = digest(given)
    with monkeypatch.context() as unread:
        unread.setattr(mapped, "blocks", None)
        assert digest(given) == digest(open_checkpoint(tmp_path)) == first
    assert digest(changed(2, 2)) != first
    refused = changed(np.nan, 3)
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"not finite: 'model.norm.weight'"):
            digest(refused)
    arrays = {norm: np.full(8, 1, np.float32)}
    assert mapped.identity(arrays[norm]) is None
    assert check_weights(leaves, {"p": like}, arrays, rules) == first
    arrays[norm][3] = 2
    assert check_weights(leaves, {"p": like}, arrays, rules) != first


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("transformer.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("transformer.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("transformer.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"),
        ("transformer.layers.0.moe_gate.kernel", "model.layers.1.mlp.gate.weight"),
        ("transformer.layers.0.mlp.again.weight", "model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_map_that_contradicts_the_names_is_found(path, source):
    right = {
        "transformer.embed_tokens.embedding": "model.embed_tokens.weight",
        "transformer.norm.scale": "model.norm.weight",
        "lm_head.embedding": "lm_head.weight",
        "transformer.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.gate_proj.weight",
        "transformer.layers.1.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight",
        "transformer.layers.1.self_attn.o_proj.weight": "model.layers.1.self_attn.o_proj.weight",
        "transformer.layers.0.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight",
        "transformer.layers.2.moe_gate.kernel": "model.layers.2.mlp.gate.weight",
    }
    assert disagreeing(right) == []
    assert f"{path} = {source}" in disagreeing(right | {path: source})
