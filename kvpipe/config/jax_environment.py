"""Environment variables for jax and the engine, which read most of them once, on import."""

from collections.abc import Mapping

from kvpipe.config.schema import EngineConfig
from kvpipe.errors import InputError

PLATFORMS = "JAX_PLATFORMS"
# Tunables of glibc, read at process start.
_TUNABLES = "GLIBC_TUNABLES"
# Keep freed memory in one heap until kvpipe returns it (:mod:`kvpipe.engine.memory`), so that a new
# leaf reuses the pages of an old one: pages that are new to a process must be zeroed first.
_ONE_HEAP = (
    "glibc.malloc.hugetlb=1",
    "glibc.malloc.arena_max=1",
    "glibc.malloc.mmap_threshold=33554432",
    "glibc.malloc.trim_threshold=1099511627776",
)
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
_SEVERAL_HOSTS = {
    # Collectives between the virtual devices of two processes.
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    # Its handler would take SIGTERM, which must end the process.
    "JAX_ENABLE_PREEMPTION_SERVICE": "false",
    # Lets the engine's constructor return on ranks after 0.
    "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
}


def check_mesh(engine: EngineConfig) -> None:
    """Refuse an impossible mesh, as far as the config alone shows.

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
            "they must be equal"
        )


def jax_environment(engine: EngineConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the engine's process needs in addition to those it inherits.

    An inherited JAX_PLATFORMS that differs from ``engine.device`` is an InputError.
    """
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
    """Return the mesh's number of devices over all hosts; None if it uses whatever exists."""
    if engine.device == "cpu":
        return cpu_devices(engine)
    return engine.tp_size and engine.tp_size * engine.dp_size


def cpu_devices(engine: EngineConfig) -> int:
    """Return the number of virtual CPU devices of the engine's mesh, over all hosts."""
    return engine.virtual_devices or (engine.tp_size or engine.nnodes) * engine.dp_size


def cpu_environment(devices: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make jax find ``devices`` virtual CPU devices and no others.

    Their memory uses transparent huge pages where madvise enables them: a KV cache is rebuilt and
    dropped several times as fast as with small pages.
    """
    flags = environ.get("XLA_FLAGS", "")
    tunables = filter(None, [environ.get(_TUNABLES), *_ONE_HEAP])
    return {
        PLATFORMS: "cpu",
        "XLA_FLAGS": f"{flags} {_DEVICE_COUNT_FLAG}={devices}".strip(),
        _TUNABLES: ":".join(tunables),
    }
