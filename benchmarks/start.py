"""The tiny run without and with the programs that an earlier run compiled, in turns, by its parts."""

import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.command import Ran, kvpipe

_TURNS = 3
_ENGINE = "engine_ready_dummy"
_SWAP = "weights_swapped_from_mllm"


def measure() -> dict[str, float]:
    """Return medians of the cold and the warm run: seconds, CPU seconds, seconds of its parts."""
    runs: dict[str, list[Ran]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as cwd:
        kvpipe(cwd)  # generates the checkpoint, warms the page cache
        for _ in range(_TURNS):
            shutil.rmtree(Path(cwd) / "cache" / "compiled")
            runs["cold"].append(kvpipe(cwd))
            runs["warm"].append(kvpipe(cwd))
    return {
        f"start.{name}_{part}": statistics.median(_parts(run)[part] for run in found)
        for name, found in runs.items()
        for part in _parts(found[0])
    }


def _parts(run: Ran) -> dict[str, float]:
    """Return the figures of a run; the engine's start has no other peak than that of its host."""
    phases = run.phases
    engine = run.record(_ENGINE)
    return {
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "until_planned_seconds": run.record("run_planned")["elapsed_s"],
        "engine_seconds": engine["duration_s"],
        "swap_seconds": run.record(_SWAP)["duration_s"],
        "other_phases_seconds": sum(
            p["duration_s"] for p in phases if p["phase"] not in (_ENGINE, _SWAP, "wandb_init")
        ),
        "between_phases_seconds": sum(p["outside_s"] for p in phases),
        "compilations": sum(p["compilations"] for p in phases),
        "programs_loaded": sum(p["programs_loaded"] for p in phases),
        "engine_peak_bytes": engine["peak"]["bytes_in_use_total"],
    }
