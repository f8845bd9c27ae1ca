"""The environment variables that jax reads once, when it is imported."""

from collections.abc import Mapping

from kvpipe.errors import InputError
from kvpipe.schema import EngineConfig

PLATFORMS = "JAX_PLATFORMS"
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def jax_environment(engine: EngineConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the engine's process needs beside those it inherits.

    Args:
        engine: the engine's options.
        environ: the environment that is inherited.

    Raises:
        InputError: JAX_PLATFORMS says another platform than ``engine.device``, or tp × dp is not
            the number of virtual devices.
    """
    inherited = environ.get(PLATFORMS)
    if inherited and inherited != engine.device:
        raise InputError(
            f"engine.device is {engine.device!r}, but the environment has {PLATFORMS}="
            f"{inherited}; unset it or set it to {engine.device}"
        )
    variables = {PLATFORMS: engine.device}
    if engine.device != "cpu":
        if engine.virtual_devices is not None:
            raise InputError(
                f"engine.virtual_devices is {engine.virtual_devices}, but engine.device is "
                f"{engine.device!r}; only the cpu has virtual devices"
            )
        return variables
    mesh = (engine.tp_size or engine.virtual_devices or 1) * engine.dp_size
    devices = engine.virtual_devices or mesh
    if engine.tp_size and mesh != devices:
        raise InputError(
            f"engine.tp_size × engine.dp_size is {engine.tp_size} × {engine.dp_size} = {mesh}, but "
            f"engine.virtual_devices is {devices}; they have to be equal"
        )
    flags = environ.get("XLA_FLAGS", "")
    variables["XLA_FLAGS"] = f"{flags} {_DEVICE_COUNT_FLAG}={devices}".strip()
    return variables
