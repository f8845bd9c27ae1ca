"""The virtual CPU devices of every benchmark: one per core of the goals' machine."""

import os
import sys

from kvpipe.config.jax_environment import cpu_environment
from kvpipe.config.schema import EngineConfig

DEVICES = 2
_READY = "KVPIPE_BENCHMARK"


def use_virtual_devices() -> None:
    """Restart in a worker's environment with :data:`DEVICES` virtual CPU devices; call this first.

    Some variables are read only at process start, so the benchmarks re-execute themselves.
    """
    if _READY in os.environ:
        return
    environ = os.environ | cpu_environment(DEVICES, os.environ) | {_READY: "1"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a benchmark has its own cache or none
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environ)


def engine_config(max_total_tokens: int) -> EngineConfig:
    """Return the config of a benchmark's engine with a KV cache of ``tokens`` tokens."""
    return EngineConfig(
        device="cpu",
        tp_size=DEVICES,
        max_total_tokens=max_total_tokens,
        context_length=256,
        max_running_requests=2,
        max_prefill_tokens=128,
        log_level="error",
    )
