"""The environment variables that jax reads once, when it is imported."""

from collections.abc import Mapping

from kvpipe.errors import InputError
from kvpipe.schema import EngineConfig

PLATFORMS = "JAX_PLATFORMS"
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def check_mesh(engine: EngineConfig) -> None:
    """Refuse a mesh that cannot be, as far as the config alone tells.

    Raises:
        InputError: tp × dp is not the number of virtual devices, or a TPU has virtual devices.
    """
    virtual = engine.virtual_devices
    if virtual is None:
        return
    if engine.device != "cpu":
        raise InputError(
            f"engine.virtual_devices is {virtual}, but engine.device is {engine.device!r}; "
            "only the cpu has virtual devices"
        )
    tp_size = engine.tp_size or max(virtual // engine.dp_size, 1)
    if tp_size * engine.dp_size != virtual:
        raise InputError(
            f"engine.tp_size × engine.dp_size is {tp_size} × {engine.dp_size} = "
            f"{tp_size * engine.dp_size}, but engine.virtual_devices is {virtual}; "
            "they have to be equal"
        )


def jax_environment(engine: EngineConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the engine's process needs beside those it inherits.

    Args:
        engine: the engine's options.
        environ: the environment that is inherited.

    Raises:
        InputError: JAX_PLATFORMS says another platform than ``engine.device``, or the mesh cannot
            be.
    """
    check_mesh(engine)
    inherited = environ.get(PLATFORMS)
    if inherited and inherited != engine.device:
        raise InputError(
            f"engine.device is {engine.device!r}, but the environment has {PLATFORMS}="
            f"{inherited}; unset it or set it to {engine.device}"
        )
    if engine.device == "cpu":
        return cpu_environment(cpu_devices(engine), environ)
    return {PLATFORMS: engine.device}


def cpu_devices(engine: EngineConfig) -> int:
    """Return the number of virtual devices that the engine's mesh takes on the CPU."""
    return engine.virtual_devices or (engine.tp_size or 1) * engine.dp_size


def cpu_environment(devices: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let jax find ``devices`` virtual CPU devices and nothing else."""
    flags = environ.get("XLA_FLAGS", "")
    return {PLATFORMS: "cpu", "XLA_FLAGS": f"{flags} {_DEVICE_COUNT_FLAG}={devices}".strip()}
