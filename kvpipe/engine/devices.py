"""Describe jax's devices and check that the engine's mesh covers all of them."""

from collections.abc import Sequence
from typing import Any

import jax

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import compat, memory
from kvpipe.errors import InputError
from kvpipe.system.process_memory import host_memory_bytes
from kvpipe.units import counted

# The kind that jax gives a device → the chip in a target's name.
_CHIPS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v6 lite": "v6e",
}


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
            "engines with 1 only; a plan for another machine may have more"
        )


def target_name() -> str:
    """Return this machine's name as a target of a plan, e.g. ``cpu`` or ``v4:2x2x1``."""
    return name_of(jax.devices())


def name_of(devices: Sequence[Any]) -> str:
    """Return the plan target of these devices, from the coordinates of a TPU's chips."""
    kind = devices[0].device_kind
    if kind not in _CHIPS:
        return devices[0].platform
    sides = [max(of_chip) + 1 for of_chip in zip(*(d.coords for d in devices), strict=True)]
    return f"{_CHIPS[kind]}:{'x'.join(map(str, sides))}"


def memory_bytes() -> int:
    """Return the bytes of memory of one device.

    Virtual CPU devices share their host's RAM, so each counts an equal part of it.
    """
    if (stats := memory.device_stats()) is not None:
        return stats[0]["bytes_limit"]
    return host_memory_bytes() // jax.local_device_count()
