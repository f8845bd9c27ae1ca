"""Each leaf of MLLM-JAX's tree holds the tensor of its own module.

There and back again, two leaves that are exchanged on the way cancel out; so one way is held here.
"""

import re

import numpy as np

from kvpipe.checkpoints.mllm import tree_from_checkpoint

VECTORS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
LINEAR = (
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)


def test_each_leaf_is_the_tensor_of_its_own_layer_and_module():
    modules = [f"layers.{layer}.{name}" for layer in (0, 1, 10) for name in (*VECTORS, *LINEAR)]
    names = [f"model.{module}.weight" for module in [*modules, "norm", "embed_tokens"]]
    names += [f"model.layers.{layer}.self_attn.{p}_proj.bias" for layer in (0, 1) for p in "qkv"]
    checkpoint = {
        name: np.full((1, 1) if "_proj.weight" in name or "embed" in name else (1,), number)
        for number, name in enumerate([*names, "lm_head.weight"])
    }
    checkpoint["lm_head.weight"] = np.full((1, 1), len(names))
    tree = tree_from_checkpoint(checkpoint)
    for name, tensor in checkpoint.items():
        *parents, leaf = re.sub(r"layers\.(\d+)", r"layers_\1", name).split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        kinds = {"bias": {"bias"}, "weight": {"kernel", "scale", "embedding"}}[leaf]
        (held,) = [array for kind, array in node.items() if kind in kinds]
        assert np.array_equal(held, tensor), name
