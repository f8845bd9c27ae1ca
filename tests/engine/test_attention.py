"""The attention of a TPU's training step, computed on CPU devices, against the one of any other device."""

from typing import Any

import numpy as np
import pytest


def test_the_kernels_of_a_tpu_give_the_values_and_the_gradients_of_the_plain_attention(
    four_devices: None,
) -> None:
    """Two devices of four query heads and two KV heads each; the length is no multiple of a block."""
    import jax
    import jax.numpy as jnp

    from kvpipe.engine import compat, forward
    from kvpipe.engine.training import auto

    mesh = auto(compat.device_mesh(2, jax.devices()[:2]))
    draw = np.random.default_rng(0)
    shapes = [(2, 200, heads, 128) for heads in (8, 4, 4)]
    arrays = [jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes]
    weights = jnp.asarray(draw.standard_normal(shapes[0]), jnp.float32)

    def found(attend: Any) -> Any:
        def weighed(*arrays: Any) -> Any:
            return (attend(*arrays, 0.09) * weights).sum()

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*arrays)

    def splash(q: Any, k: Any, v: Any, scale: float) -> Any:
        return forward._splash(q, k, v, scale, mesh, interpret=True)

    (value, gradients), (expected, wanted) = found(splash), found(forward._causal)
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    for given, like in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(given, like, atol=1e-4, rtol=1e-4)
