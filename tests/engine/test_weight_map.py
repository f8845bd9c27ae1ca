"""Every parameter of a live engine has the values of the tensor that bears its name.

The expected layout is written down here and not read off the engine's own weight mapping, as the
product does it: an entry that is wrong there would be wrong on both sides.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.safetensors import Tensors
from tests.conftest import DEVICES

pytestmark = pytest.mark.slow

KV_HEADS, HEAD_DIM = 2, 128  # of the tiny model; the engine has a KV head for each device


def expected(name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a tensor of the tiny model as an engine over four devices lays it out."""
    module = name.split(".")[-2]
    laid_out = tensor.T if module.endswith("_proj") else tensor
    if module not in ("k_proj", "v_proj"):
        return laid_out
    heads = laid_out.reshape(*laid_out.shape[:-1], KV_HEADS, HEAD_DIM)
    repeated = np.repeat(heads, DEVICES // KV_HEADS, axis=-2)
    return repeated.reshape(*laid_out.shape[:-1], DEVICES * HEAD_DIM)


def tensor_of(path: str) -> str:
    """Return the Hugging Face name of a parameter, e.g. of ``transformer.norm.scale``."""
    *modules, leaf = path.split(".")[1:]
    return ".".join(("model", *modules, "bias" if leaf == "bias" else "weight"))


@pytest.mark.parametrize("way", ["swap", "stream", "sync"])
def test_every_parameter_has_the_values_of_its_own_tensor(
    real_engine: Any, tiny_weights: Tensors, way: str
) -> None:
    import jax

    from kvpipe.engine import training, weights

    zeros = {name: np.zeros_like(tensor) for name, tensor in tiny_weights.items()}
    weights.swap(real_engine, weights.build(real_engine, zeros))
    ways: dict[str, Callable[[], object]] = {
        "swap": lambda: weights.swap(real_engine, weights.build(real_engine, tiny_weights)),
        "stream": lambda: weights.stream(real_engine, tiny_weights),
        "sync": lambda: training.sync(
            real_engine,
            jax.device_put(
                dict(tiny_weights),
                jax.sharding.NamedSharding(
                    training.mesh(real_engine), jax.sharding.PartitionSpec()
                ),
            ),
        ),
    }
    ways[way]()
    found = {tensor_of(path): leaf for path, leaf in weights.parameters(real_engine).items()}
    assert found.keys() == tiny_weights.keys()
    wrong = [
        name
        for name, leaf in found.items()
        if not np.array_equal(np.asarray(leaf), expected(name, tiny_weights[name]))
    ]
    assert wrong == []


def test_the_tensors_of_the_tiny_model_differ_so_that_an_exchange_shows(
    tiny_weights: Tensors,
) -> None:
    matrices = [tensor for tensor in tiny_weights.values() if tensor.ndim == 2]
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices)
