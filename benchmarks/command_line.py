"""The CPU time of short commands, as a multiple of importing Hydra, which each of them does.

Seconds would depend on the machine's load; the two are measured in turns.
"""

import os
import statistics
import subprocess
import sys
import tempfile

_TURNS = 5
_COMMANDS = {
    "help": ("--help",),
    "cfg_job": ("--cfg", "job", "+experiment=qwen25_3b_bigkv"),
    "check": ("check", "+experiment=qwen25_3b_bigkv"),
    "phases": ("phases",),
}


def measure() -> dict[str, float]:
    """Return the CPU seconds of importing Hydra, and of each command as a multiple of it."""
    hydra = [_cpu_seconds("-c", "import hydra") for _ in range(_TURNS)]
    measured = {"command_line.import_hydra_cpu_seconds": statistics.median(hydra)}
    for name, arguments in _COMMANDS.items():
        ratios = [
            _cpu_seconds("-m", "kvpipe", *arguments) / _cpu_seconds("-c", "import hydra")
            for _ in range(_TURNS)
        ]
        measured[f"command_line.{name}_per_import_of_hydra"] = statistics.median(ratios)
    return measured


def _cpu_seconds(*arguments: str) -> float:
    """Run Python with arguments in an empty directory; return the CPU seconds that it took."""
    # The benchmarks' own devices are not the command's.
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    before = os.times()
    with tempfile.TemporaryDirectory() as cwd:
        subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=inherited,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system
