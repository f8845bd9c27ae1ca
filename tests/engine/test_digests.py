"""The digest of a parameter: exact, the same for every sharding, and another one for every mistake."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpipe.checkpoints import mapped
from kvpipe.engine import digests
from kvpipe.engine.digests import Heads, Proof, SourceSum, rule_of
from kvpipe.errors import EngineError

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
WIDENED = Heads(query=4, kv=2, dim=3, engine_dim=4)
QUERY, KEY, OUT = (
    "l.0.self_attn.q_proj.weight",
    "l.0.self_attn.k_proj.weight",
    "l.0.self_attn.o_proj.weight",
)
KEY_BIAS, NORM = "l.0.self_attn.k_proj.bias", "l.0.input_layernorm.weight"
DOWN, EMBEDDING = "l.0.mlp.down_proj.weight", "model.embed_tokens.weight"
# Each with its shape in the checkpoint, its shape in the engine and how the engine splits it.
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    QUERY: ((12, 8), (8, 16), (None, "tensor")),
    KEY: ((6, 8), (8, 16), (None, "tensor")),
    OUT: ((8, 12), (16, 8), ("tensor", None)),
    KEY_BIAS: ((6,), (16,), ("tensor",)),
    NORM: ((40,), (40,), (None,)),
    DOWN: ((8, 136), (136, 8), ("tensor", None)),
    EMBEDDING: ((37, 8), (37, 8), (None, None)),
}


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
    """Return values that all differ in their bits."""
    kind = np.dtype(f"u{np.dtype(dtype).itemsize}")
    order = np.random.default_rng(seed).permutation(math.prod(shape)).astype(kind)
    return (order * kind.type(97) + kind.type(11)).view(dtype).reshape(shape)


def in_the_engine(name: str, weight: Any) -> Any:
    """Return a weight in the engine's layout, element by element and without any of kvpipe's code."""
    shape = KINDS[name][1]
    laid_out = np.zeros(shape, weight.dtype)
    for index in np.ndindex(shape):
        at = list(reversed(index)) if len(shape) == 2 and name != EMBEDDING else list(index)
        if name in (QUERY, KEY, KEY_BIAS, OUT):
            axis = 1 if name == OUT else 0
            head, within = divmod(at[axis], WIDENED.engine_dim)
            if within >= WIDENED.dim:
                continue  # padding
            head = head // 2 if name in (KEY, KEY_BIAS) else head
            at[axis] = head * WIDENED.dim + within
        laid_out[index] = weight[tuple(at)]
    return laid_out


def on_devices(array: Any, devices: int, spec: tuple[Any, ...]) -> Any:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "tensor"))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def found(name: str, array: Any) -> digests.Digest:
    return digests.of_engine({"p": rule_of(name, array.shape, WIDENED)}, {"p": array})["p"]


def of_source(name: str, weight: Any, dtype: Any, block_bytes: int = 64) -> digests.Digest:
    source = SourceSum(rule_of(name, KINDS[name][1], WIDENED), weight, dtype)
    for block in mapped.blocks(weight, source.block_bytes(block_bytes, weight.itemsize)):
        source.add(block)
    return source.digest


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, BFLOAT16) for name in KINDS), (KEY, FLOAT32), (EMBEDDING, FLOAT32)]
)
def test_a_parameter_has_the_digest_of_its_source_on_any_number_of_devices_and_in_any_memory_order(
    four_devices: None, name: str, dtype: Any
) -> None:
    shape, _, spec = KINDS[name]
    weight = values(shape, dtype)
    laid_out = in_the_engine(name, weight)
    expected = of_source(name, weight, dtype)
    assert of_source(name, np.asfortranarray(weight), dtype, 999) == expected
    assert {found(name, on_devices(laid_out, n, spec)) for n in (1, 4)} == {expected}
    rule = rule_of(name, laid_out.shape, WIDENED)
    trained = on_devices(weight, 2, (None,) * weight.ndim)
    assert digests.of_trainer({"p": rule}, {name: trained}, {"p": dtype}) == {"p": expected}


@pytest.mark.parametrize("name", KINDS)
def test_the_digest_of_a_set_is_the_checkpoints_however_heads_are_repeated_and_padded(
    four_devices: None, name: str
) -> None:
    shape, _, spec = KINDS[name]
    weight = values(shape, np.float32)

    def whole(array: Any, heads: Heads) -> str:
        rules = {"p": rule_of(name, array.shape, heads)}
        return digests.of_set(rules, {"p": array}, digests.of_engine(rules, {"p": array}))

    transposed = weight.T if len(shape) == 2 and name != EMBEDDING else weight
    plain = whole(on_devices(transposed, 1, spec), Heads(4, 2, 3, 3))
    assert whole(on_devices(in_the_engine(name, weight), 4, spec), WIDENED) == plain
    assert plain != whole(
        on_devices(values(transposed.shape, np.float32, 1), 1, spec), Heads(4, 2, 3, 3)
    )


@settings(max_examples=60)
@given(st.sampled_from([KEY, DOWN]), st.sampled_from([BFLOAT16, FLOAT32]), st.data())
def test_any_two_different_values_that_are_exchanged_are_found(four_devices, name, dtype, data):
    laid_out = in_the_engine(name, values(KINDS[name][0], dtype))
    flat = laid_out.reshape(-1)
    one, other = (data.draw(st.integers(0, flat.size - 1)) for _ in range(2))
    if data.draw(st.booleans()):  # values that differ in the sign alone
        flat[other] = -flat[one]
    exchanged = laid_out.copy()
    exchanged.reshape(-1)[[one, other]] = flat[[other, one]]
    before, after = (on_devices(a, 2, KINDS[name][2]) for a in (laid_out, exchanged))
    same = laid_out.tobytes() == exchanged.tobytes()
    assert (found(name, before) == found(name, after)) == same


@settings(max_examples=60)
@given(st.sampled_from([KEY, DOWN]), st.sampled_from([BFLOAT16, FLOAT32]), st.data())
def test_a_single_flipped_bit_is_found_in_padding_and_in_replicas_too(
    four_devices, name, dtype, data
):
    laid_out = in_the_engine(name, values(KINDS[name][0], dtype))
    before = found(name, on_devices(laid_out, 2, KINDS[name][2]))
    bits = laid_out.reshape(-1).view(f"u{laid_out.itemsize}")
    at = data.draw(st.integers(0, bits.size - 1))
    bits[at] ^= bits.dtype.type(1 << data.draw(st.integers(0, 8 * bits.itemsize - 1)))
    assert found(name, on_devices(laid_out, 2, KINDS[name][2])) != before


def test_a_transposed_matrix_exchanged_rows_and_heads_in_turns_are_found(
    four_devices: None,
) -> None:
    weight = values((16, 16), ml_dtypes.bfloat16)
    square = rule_of("l.0.mlp.up_proj.weight", (16, 16), WIDENED)

    def digest(array: Any) -> digests.Digest:
        return digests.of_engine({"p": square}, {"p": on_devices(array, 2, (None, "tensor"))})["p"]

    rows = weight[[1, 0, *range(2, 16)]]
    assert len({digest(array) for array in (weight, weight.T, rows, rows.T)}) == 4
    heads = in_the_engine(KEY, values((6, 8), np.float32)).reshape(8, 4, 4)
    right, turns = heads.reshape(8, 16), heads[:, [0, 2, 0, 2]].reshape(8, 16)
    spec = KINDS[KEY][2]
    assert found(KEY, on_devices(right, 4, spec)) != found(KEY, on_devices(turns, 4, spec))


def test_a_source_is_cast_to_the_dtype_of_the_parameter(four_devices: None) -> None:
    shape, _, spec = KINDS[DOWN]
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    cast = on_devices(in_the_engine(DOWN, weight.astype(ml_dtypes.bfloat16)), 2, spec)
    expected = found(DOWN, cast)
    assert of_source(DOWN, weight, cast.dtype) == expected
    rules = {"p": rule_of(DOWN, cast.shape, WIDENED)}
    trained = on_devices(weight, 2, (None, "tensor"))
    assert digests.of_trainer(rules, {DOWN: trained}, {"p": cast.dtype}) == {"p": expected}


def test_replicas_that_differ_are_refused_by_the_name_of_the_parameter(four_devices: None) -> None:
    import jax

    array = on_devices(values((40,), np.float32), 2, (None,))
    one, other = (shard.data for shard in array.addressable_shards)
    torn = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [one, -other])
    with pytest.raises(EngineError, match=r"parameter 'p': .* holds other values than its replica"):
        digests.of_engine({"p": rule_of(NORM, (40,), WIDENED)}, {"p": torn})


def test_a_digest_takes_a_fraction_of_the_parameter_and_leaves_no_array(four_devices: None) -> None:
    import jax

    array = on_devices(values((2048, 512), ml_dtypes.bfloat16), 2, (None, "tensor"))
    alive = {id(a) for a in jax.live_arrays()}
    digests.of_engine({"p": rule_of(DOWN, array.shape, WIDENED)}, {"p": array})
    assert {id(a) for a in jax.live_arrays()} <= alive
    program, _ = digests._program(array.sharding, 2, 0, np.dtype(array.dtype))
    multipliers = (np.zeros((2, 512), np.uint32), np.zeros(2048, np.uint32), np.uint32(0))
    used = program.lower(array, *multipliers).compile().memory_analysis()
    assert used.temp_size_in_bytes * 8 < array.nbytes // 2


def test_a_proof_names_the_parameters_that_are_not_their_sources() -> None:
    leaves = {"a": (1, 2), "b": (3, 4)}
    assert Proof().fields == {} and Proof(leaves, "f0").checks == ()
    (check,) = Proof(leaves, "f0", proven=True, wrong=("b",)).checks
    assert (check.name, check.expected, check.actual, check.passed) == (
        "weights_proven",
        2,
        1,
        False,
    )
    assert check.detail == "differ from their source: b"
    assert Proof(leaves, "f0", proven=True).checks[0].passed
