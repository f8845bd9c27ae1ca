"""The tiny run without and with the programs that an earlier run compiled, in turns, by its parts.

Then a start without weights beside one with random weights, until the checkpoint's are streamed in.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.command import Ran, kvpipe

_TURNS = 3
_ENGINE = "engine_ready_dummy"
_SWAP = "weights_swapped_from_mllm"
_STREAMED = "weights_streamed"
_STARTS = {"empty": "engine_ready_empty", "dummy": _ENGINE}
_REST = (
    *("flush_cache_before_kv_drop", "kv_cache_dropped", "weights_offloaded", "weights_restored"),
    *("kv_cache_rebuilt", "generate_result_after_kv_rebuild", "weights_dropped"),
    *("weights_streamed_again", "generate_result_after_swap"),
)
STREAM_AND_GENERATE = ("+experiment=tiny_stream", f"pipeline_edit.remove=[{','.join(_REST)}]")
"""Options of a run that streams the checkpoint's weights in, generates and ends."""


def measure() -> dict[str, float]:
    """Return medians of the cold and the warm run: seconds, CPU seconds, seconds of its parts."""
    runs: dict[str, list[Ran]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as cwd:
        kvpipe(cwd)  # generates the checkpoint, warms the page cache
        for _ in range(_TURNS):
            shutil.rmtree(Path(cwd) / "cache" / "compiled")
            runs["cold"].append(kvpipe(cwd))
            runs["warm"].append(kvpipe(cwd))
        starts = medians_of_starts("start", cwd, _TURNS, "sampling.max_new_tokens=16")
    return starts | {
        f"start.{name}_{part}": statistics.median(_parts(run)[part] for run in found)
        for name, found in runs.items()
        for part in _parts(found[0])
    }


def medians_of_starts(prefix: str, cwd: str, turns: int, *options: str) -> dict[str, float]:
    """Return the medians of both starts, each until it has the checkpoint's weights, in turns.

    Raises:
        RuntimeError: the engine gives other token ids than after the other start.
    """
    runs: dict[str, list[Ran]] = {name: [] for name in _STARTS}
    for _ in range(turns):
        for name, phase in _STARTS.items():
            start = f"pipeline_edit.replace.{_STARTS['empty']}={phase}"
            runs[name].append(kvpipe(cwd, *STREAM_AND_GENERATE, start, *options))
    ids = [run.record("generate_result")["token_ids"] for found in runs.values() for run in found]
    if any(other != ids[0] for other in ids):
        raise RuntimeError(f"the starts do not give the same token ids: {ids}")
    return {
        f"{prefix}.{name}_{part}": statistics.median(_until_streamed(r, name)[part] for r in found)
        for name, found in runs.items()
        for part in _until_streamed(found[0], name)
    }


def _until_streamed(run: Ran, start: str) -> dict[str, float]:
    engine, streamed = run.record(_STARTS[start]), run.record(_STREAMED)
    held = streamed["ledger"]
    peak_of_stream = streamed["peak"]["bytes_in_use_total"] - held["kv"]
    return {
        "run_cpu_seconds": run.cpu_seconds,
        "engine_seconds": engine["duration_s"],
        "until_streamed_seconds": engine["duration_s"] + streamed["duration_s"],
        "param_bytes": held["params"],
        "engine_peak_bytes": engine["peak"]["bytes_in_use_total"],
        "stream_params_peak_over_params": peak_of_stream / held["params"],
        "engine_peak_rss_bytes": engine["memory"]["process_peak_rss_bytes"],
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
