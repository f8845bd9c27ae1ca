"""The bytes that a device gives an array: a TPU pads small ones to tiles.

Only the compiler knows these sizes. The output of a program that returns zeros of a shard's shape
and dtype, compiled for one device, has them; with several outputs it would also have their table.
The layout is the one that the compiler chooses for an output, as for the arrays of a run.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kvpipe.engine.program_cache import file_for, write

# By kind of device, dtype and shape of the shard.
_sizes: dict[str, int] = {}


def shard_bytes(array: Any, device: Any) -> int:
    """Return the bytes that a device gives one shard of an array.

    Args:
        array: an array, or a shape with dtype and sharding.
        device: a device of the kind that is asked about, here or described by a topology.
    """
    shape = array.sharding.shard_shape(array.shape)
    if device.platform == "cpu":  # pads nothing
        return math.prod(shape) * array.dtype.itemsize
    key = f"{device.device_kind}: {array.dtype.name}{list(shape)}"
    if key not in _sizes:
        zeros = jax.jit(
            lambda: jnp.zeros(shape, array.dtype), out_shardings=SingleDeviceSharding(device)
        )
        used: Any = zeros.lower().compile().memory_analysis()
        _sizes[key] = used.output_size_in_bytes
    return _sizes[key]


@contextmanager
def kept_in(cache_dir: Path) -> Iterator[None]:
    """Read the sizes that earlier processes have compiled, and write those that are new."""
    path = file_for({"arrays": "zeros"}, cache_dir)
    known = json.loads(path.read_text()) if path.is_file() else {}
    _sizes.update(known)
    yield
    if _sizes != known:
        write(path, _sizes)
