"""The environment variables that jax and the engine read, most of them once when imported."""

from collections.abc import Mapping

from kvpipe.errors import InputError
from kvpipe.schema import EngineConfig

PLATFORMS = "JAX_PLATFORMS"
# Tunables of glibc; it reads them as a process starts.
_TUNABLES = "GLIBC_TUNABLES"
# What is freed stays in one heap until kvpipe gives it back (:mod:`kvpipe.engine.memory`), so that a
# new leaf takes over the pages of an old one: pages that are new to a process have to be zeroed.
_ONE_HEAP = (
    "glibc.malloc.hugetlb=1",
    "glibc.malloc.arena_max=1",
    "glibc.malloc.mmap_threshold=33554432",
    "glibc.malloc.trim_threshold=1099511627776",
)
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
_SEVERAL_HOSTS = {
    # How virtual devices of two processes reach each other.
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    # It would take SIGTERM, which has to end the process.
    "JAX_ENABLE_PREEMPTION_SERVICE": "false",
    # The engine's constructor returns on hosts after the first too.
    "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
}


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
    several = _SEVERAL_HOSTS if engine.nnodes > 1 else {}
    if engine.device == "cpu":
        return several | cpu_environment(cpu_devices(engine) // engine.nnodes, environ)
    return several | {PLATFORMS: engine.device}


def device_total(engine: EngineConfig) -> int | None:
    """Return the number of devices that the mesh has on all hosts; None if it takes what is there."""
    if engine.device == "cpu":
        return cpu_devices(engine)
    return engine.tp_size and engine.tp_size * engine.dp_size


def cpu_devices(engine: EngineConfig) -> int:
    """Return the number of virtual devices that the engine's mesh takes on the CPUs of all hosts."""
    return engine.virtual_devices or (engine.tp_size or engine.nnodes) * engine.dp_size


def cpu_environment(devices: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let jax find ``devices`` virtual CPU devices and nothing else.

    Their memory is the host's, in huge pages where Linux gives them to who asks: a KV cache is
    rebuilt and dropped several times as fast as page by page.
    """
    flags = environ.get("XLA_FLAGS", "")
    tunables = filter(None, [environ.get(_TUNABLES), *_ONE_HEAP])
    return {
        PLATFORMS: "cpu",
        "XLA_FLAGS": f"{flags} {_DEVICE_COUNT_FLAG}={devices}".strip(),
        _TUNABLES: ":".join(tunables),
    }
