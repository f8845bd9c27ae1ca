import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvpipe.checkpoints.mllm import hf_weights, leaves, tree_from_checkpoint
from kvpipe.errors import InputError

LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
VECTORS = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    *(f"self_attn.{name}_proj.bias" for name in "qkv"),
]
layers = st.integers(0, 120).map(lambda number: f"model.layers.{number}.")
matrix_names = st.one_of(
    st.sampled_from(["model.embed_tokens.weight", "lm_head.weight"]),
    st.tuples(layers, st.sampled_from([f"{name}.weight" for name in LINEAR])).map("".join),
)
vector_names = st.one_of(
    st.just("model.norm.weight"), st.tuples(layers, st.sampled_from(VECTORS)).map("".join)
)
dtypes = st.sampled_from([np.uint16, np.float16, np.float32])


def arrays(ndim):
    return dtypes.flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=ndim, max_dims=ndim, max_side=4))
    ).map(lambda array: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array)


checkpoints = st.builds(
    lambda matrices, vectors: matrices | vectors,
    st.dictionaries(matrix_names, arrays(2), max_size=5),
    st.dictionaries(vector_names, arrays(1), max_size=5),
)


@given(checkpoint=checkpoints)
def test_checkpoint_to_tree_and_back_is_bit_identical(checkpoint):
    back = hf_weights(tree_from_checkpoint(checkpoint))
    assert set(back) == set(checkpoint)
    for name, array in checkpoint.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


@given(checkpoint=checkpoints)
def test_the_tree_has_the_checkpoints_leaves_and_bytes(checkpoint):
    tree = tree_from_checkpoint(checkpoint)
    sizes = [array.nbytes for _, array in leaves(tree)]
    assert len(sizes) == len(checkpoint) == len(hf_weights(tree))
    assert sum(sizes) == sum(array.nbytes for array in checkpoint.values())


def test_every_leaf_has_its_mllm_jax_path():
    names = [f"model.layers.11.{name}" for name in [*VECTORS, *(f"{n}.weight" for n in LINEAR)]]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    ndims = {name: 2 if "_proj.weight" in name or "embed" in name else 1 for name in names}
    ndims["lm_head.weight"] = 2
    tree = tree_from_checkpoint({name: np.zeros((1,) * ndim) for name, ndim in ndims.items()})
    shape = {}
    for name in "qkv":
        shape[f"{name}_proj"] = ["bias", "kernel"]
    assert _outline(tree) == {
        "model": {
            "embed_tokens": ["embedding"],
            "norm": ["scale"],
            "layers_11": {
                "input_layernorm": ["scale"],
                "post_attention_layernorm": ["scale"],
                "self_attn": {
                    **shape,
                    "o_proj": ["kernel"],
                    "q_norm": ["scale"],
                    "k_norm": ["scale"],
                },
                "mlp": {name: ["kernel"] for name in ("gate_proj", "up_proj", "down_proj")},
            },
        },
        "lm_head": ["kernel"],
    }


def _outline(node):
    if all(isinstance(value, np.ndarray) for value in node.values()):
        return sorted(node)
    return {key: _outline(value) for key, value in node.items()}


def test_kernels_are_transposed_views_in_both_directions():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)  # [out, in]
    tree = tree_from_checkpoint({"lm_head.weight": weight})
    kernel = tree["lm_head"]["kernel"]
    assert kernel.shape == (3, 2)
    assert np.shares_memory(kernel, weight)
    assert np.shares_memory(hf_weights(tree)["lm_head.weight"], weight)


def test_the_embedding_is_not_transposed():
    weight = np.zeros((5, 2))
    tree = tree_from_checkpoint({"model.embed_tokens.weight": weight})
    assert tree["model"]["embed_tokens"]["embedding"] is weight


def test_a_dtype_that_a_leaf_has_already_copies_nothing():
    weight = np.zeros((2, 3), ml_dtypes.bfloat16)
    kernel = tree_from_checkpoint({"lm_head.weight": weight}, dtype="bfloat16")["lm_head"]["kernel"]
    assert np.shares_memory(kernel, weight)


def test_a_cast_does_not_pass_through_float16():
    """The script that kvpipe replaces lost 277 small values, and large ones became infinite."""
    values = np.array([[1e-30, 3e38, 65536.0]], ml_dtypes.bfloat16)
    tree = tree_from_checkpoint({"lm_head.weight": values}, dtype="float32")
    kernel = tree["lm_head"]["kernel"]
    assert kernel.dtype == np.float32
    assert np.array_equal(kernel.T.astype(ml_dtypes.bfloat16), values)


def test_an_unknown_dtype_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="unknown dtype 'bf16'; did you mean 'bfloat16'"):
        tree_from_checkpoint({}, dtype="bf16")


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.01.mlp.up_proj.weight",
        "model.layers_0.mlp.up_proj.weight",
        "model.layers.#.mlp.up_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
        "transformer.model.layers.0.mlp.up_proj.weight",
        "",
    ],
)
def test_a_tensor_that_the_tree_has_no_place_for_is_refused_by_name(name):
    with pytest.raises(InputError, match="without a counterpart") as error:
        tree_from_checkpoint({name: np.zeros((1, 1))})
    assert repr(name) in str(error.value)


def test_a_misspelled_leaf_is_refused_with_the_nearest_path():
    with pytest.raises(
        InputError, match=r"'model.norm.scales'; .* did you mean 'model.norm.scale'"
    ):
        hf_weights({"model": {"norm": {"scales": np.zeros(1)}}})


def test_a_kernel_with_one_dimension_is_refused():
    with pytest.raises(
        InputError, match=r"lm_head.weight has shape \[4\], it must have 2 dimensions"
    ):
        tree_from_checkpoint({"lm_head.weight": np.zeros(4)})


def test_a_scale_with_two_dimensions_is_refused():
    with pytest.raises(
        InputError, match=r"model.norm.scale has shape \[1, 4\], it must have 1 dimension"
    ):
        hf_weights({"model": {"norm": {"scale": np.zeros((1, 4))}}})


def test_a_leaf_that_is_no_array_is_refused():
    with pytest.raises(InputError, match=r"model.norm.scale should be an array, got NoneType"):
        hf_weights({"model": {"norm": {"scale": None}}})
