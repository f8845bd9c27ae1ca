"""A plan that is made, and the same plan from the cache, in turns."""

import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.command import Ran, kvpipe

_TURNS = 3
_COMMAND = ("plan", "+experiment=qwen25_3b_bigkv", "plan.compile=false", "plan.file=plan.md")


def measure() -> dict[str, float]:
    """Return medians of seconds and CPU seconds of both."""
    runs: dict[str, list[Ran]] = {"made": [], "kept": []}
    with tempfile.TemporaryDirectory() as cwd:
        for _ in range(_TURNS):
            shutil.rmtree(Path(cwd) / "cache", ignore_errors=True)
            runs["made"].append(kvpipe(cwd, *_COMMAND))
            runs["kept"].append(kvpipe(cwd, *_COMMAND))
    return {
        f"plan.{name}_{unit}": statistics.median(getattr(run, unit) for run in found)
        for name, found in runs.items()
        for unit in ("seconds", "cpu_seconds")
    }
