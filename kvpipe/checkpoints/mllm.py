"""Convert between MLLM-JAX's parameter tree and Hugging Face names, in both directions.

Both are renames and transposed views: nothing is copied, and values are cast only to a dtype that
the caller asks for. This module refuses names that have no place in the tree; which leaves a model
requires is checked by the engine.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvpipe.checkpoints import HOST_DTYPES
from kvpipe.errors import InputError
from kvpipe.suggest import nearest
from kvpipe.units import counted

_LAYER_TEMPLATES = {
    f"model.layers.#.{module}.{hf_leaf}": f"model.layers_#.{module}.{leaf}"
    for modules, hf_leaf, leaf in (
        (("input_layernorm", "post_attention_layernorm"), "weight", "scale"),
        (("self_attn.q_norm", "self_attn.k_norm"), "weight", "scale"),
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "weight", "kernel"),
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "bias", "bias"),
        (("self_attn.o_proj",), "weight", "kernel"),
        (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "weight", "kernel"),
    )
    for module in modules
}
_TEMPLATES = {  # Hugging Face name -> path in the tree; '#' is the layer number
    "model.embed_tokens.weight": "model.embed_tokens.embedding",
    "model.norm.weight": "model.norm.scale",
    "lm_head.weight": "lm_head.kernel",
    **_LAYER_TEMPLATES,
}
_TEMPLATES_BACK = {path: name for name, path in _TEMPLATES.items()}
_LAYER_NUMBER = re.compile(r"(?<=^model\.layers[._])(0|[1-9][0-9]*)(?=\.)")
_NDIMS = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1}

Tree = dict[str, Any]
"""Nested dictionaries with arrays as leaves."""


def tree_from_checkpoint(source: Mapping[str, NDArray[Any]], dtype: str | None = None) -> Tree:
    """Return tensors, under their Hugging Face names, as MLLM-JAX's nested tree.

    It is `{"model": {"embed_tokens": {"embedding": ...}, "layers_0": ..., "norm": ...}, "lm_head":
    ...}`; its kernels are `[in, out]`, where linear weights are `[out, in]`. Every leaf is cast to
    `dtype` directly; with None it keeps its own, and is a view of the source's array.

    Raises:
        InputError: a name has no place in the tree, a tensor has the wrong number of dimensions,
            or the dtype is unknown.
    """
    if dtype is not None and dtype not in HOST_DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {nearest(dtype, HOST_DTYPES)}")
    _refuse_unknown("checkpoint tensors", source, _TEMPLATES)
    tree: Tree = {}
    for name in source:
        *parents, leaf = _rename(name, _TEMPLATES).split(".")
        array = source[name]
        _check_ndim(name, array, leaf)
        if dtype is not None:
            array = array.astype(getattr(ml_dtypes, dtype, dtype), copy=False)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _flip(array, leaf)
    return tree


def hf_weights(tree: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return a tree's leaves under their Hugging Face names, linear weights as `[out, in]`.

    The arrays are the tree's own or views of them, never copies.

    Raises:
        InputError: a leaf has no Hugging Face name, or is not an array with the right number of
            dimensions.
    """
    found = dict(leaves(tree))
    _refuse_unknown("parameter tree leaves", found, _TEMPLATES_BACK)
    weights: dict[str, NDArray[Any]] = {}
    for path, array in found.items():
        leaf = path.rpartition(".")[2]
        _check_ndim(path, array, leaf)
        weights[_rename(path, _TEMPLATES_BACK)] = _flip(array, leaf)
    return weights


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its path, joined by dots."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def _template(name: str) -> str:
    return _LAYER_NUMBER.sub("#", name)


def _rename(name: str, templates: Mapping[str, str]) -> str:
    """Return the name on the other side; `name` must have one."""
    number = _LAYER_NUMBER.search(name)
    renamed = templates[_template(name)]
    return renamed.replace("#", number[0]) if number else renamed


def _refuse_unknown(what: str, names: Mapping[str, Any], templates: Mapping[str, str]) -> None:
    # A name that contains '#' itself would match a template.
    unknown = [name for name in names if "#" in name or _template(name) not in templates]
    if unknown:
        raise InputError(
            f"{what} without a counterpart: {', '.join(map(repr, unknown))}; "
            f"for {unknown[0]!r} {nearest(_template(unknown[0]), templates)}"
        )


def _check_ndim(name: str, array: object, leaf: str) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} should be an array, got {type(array).__name__}")
    if array.ndim != _NDIMS[leaf]:
        raise InputError(
            f"{name} has shape {list(array.shape)}, it must have {counted(_NDIMS[leaf], 'dimension')}"
        )


def _flip(array: NDArray[Any], leaf: str) -> NDArray[Any]:
    """Transpose a kernel between `[out, in]` and `[in, out]`, as a view."""
    return array.T if leaf == "kernel" else array
