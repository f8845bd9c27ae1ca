"""Describe jax's devices and check that the engine's mesh covers all of them."""

from typing import Any

import jax
import psutil

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import compat
from kvpipe.errors import InputError
from kvpipe.units import counted


def describe() -> dict[str, Any]:
    """Return versions and devices, for the run's records."""
    return {
        "jax_version": jax.__version__,
        "sgl_jax_version": compat.sgl_jax_version(),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
    }


def check_devices(config: EngineConfig) -> None:
    """Require a mesh over all devices, and the platform that jax runs on.

    Raises:
        InputError: with the device count and the sizes that would fit it.
    """
    platform, count = jax.default_backend(), jax.device_count()
    if platform != config.device:
        raise InputError(f"engine.device is {config.device!r}, but jax runs on {platform!r}")
    tp_size = config.tp_size or count // config.dp_size
    if tp_size * config.dp_size != count:
        raise InputError(
            f"engine.tp_size × engine.dp_size is {tp_size} × {config.dp_size}, but jax has "
            f"{counted(count, f'{platform} device')}; the product must be {count}"
        )
    if config.dp_size > 1 and not compat.shards_explicitly():
        raise InputError(
            f"engine.dp_size is {config.dp_size}, but sglang-jax {compat.sgl_jax_version()} starts "
            "no engine with more than 1; a plan for another machine may have it"
        )


def memory_bytes() -> int:
    """Return the bytes of memory of one device.

    Virtual CPU devices share their host's RAM, so each counts an equal part of it.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return int(stats["bytes_limit"])
    return psutil.virtual_memory().total // jax.local_device_count()
