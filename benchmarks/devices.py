"""The virtual CPU devices of every benchmark: one a core of the machine that the goals are for."""

import os
import sys

from kvpipe.jax_environment import cpu_environment

DEVICES = 2
_READY = "KVPIPE_BENCHMARK"


def use_virtual_devices() -> None:
    """Let jax find :data:`DEVICES` CPU devices, in the environment that a run's worker has.

    It is read as a process starts, so the benchmarks begin anew in it; to be called first.
    """
    if _READY in os.environ:
        return
    environ = os.environ | cpu_environment(DEVICES, os.environ) | {_READY: "1"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environ)
