"""The virtual CPU devices of every benchmark: one per core of the goals' machine."""

import os
import sys

from kvpipe.config.jax_environment import cpu_environment

DEVICES = 2
_READY = "KVPIPE_BENCHMARK"


def use_virtual_devices() -> None:
    """Restart in a worker's environment with :data:`DEVICES` virtual CPU devices; call this first.

    Some variables are read only at process start, so the benchmarks re-execute themselves.
    """
    if _READY in os.environ:
        return
    environ = os.environ | cpu_environment(DEVICES, os.environ) | {_READY: "1"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environ)
