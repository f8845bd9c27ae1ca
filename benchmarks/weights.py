"""Speed of transferring weights into a live engine, next to the limits of the machine.

All ways start from the same files in the page cache and are measured in turns. Memory is measured
in a separate turn, since sampling costs time. ``sop_path`` uses kvpipe's own phases with two live
sets, bfloat16 throughout; ``script_path`` casts through float16, as the script does that kvpipe
replaces. ``swap_undigested`` and ``sop_path_undigested`` are the same without digests of the weights.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from benchmarks.devices import engine_config
from kvpipe.checkpoints.mllm import hf_weights, tree_from_checkpoint
from kvpipe.checkpoints.model_dir import cache_dir
from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import Kvpipe
from kvpipe.engine import compat, memory, sglang, weights
from kvpipe.engine.params import ParamTable
from kvpipe.engine.peaks import PeakSampler
from kvpipe.engine.weight_map import EngineView, leaf_sources
from kvpipe.records.run import Memory
from kvpipe.system.process_memory import process_memory

MODEL = TinyModel(  # the tensors of a 3B model, fewer layers: 0.79 GB in bfloat16
    hidden_size=2048,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=2,
    intermediate_size=11008,
    vocab_size=4096,
)
CACHE = cache_dir(Kvpipe())
TURNS = 5
_SHARE = 0.5  # share of the time for sampling; a sampled turn is not timed
WHOLE = (slice(None), slice(None))

Run = Callable[[], Any]


def measure() -> dict[str, float]:
    """Measure all ways, print a table, and return the ratios by key."""
    directory = ensure(MODEL, CACHE)
    engine = sglang.start(engine_config(1024), directory, idle_timeout_s=60.0)
    ways = _ways(engine, directory)
    seconds = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, run in ways.items():
            memory.give_back_host_memory()
            began = time.perf_counter()
            run()
            if turn:  # the first turn is a warm-up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    set_bytes = weights.live_bytes(engine)
    peaks = {name: _peaks(run, set_bytes) for name, run in ways.items()}
    engine.shut_down()
    host_bytes = sum(array.nbytes for array in open_checkpoint(directory).values())
    _print_table(medians, peaks, host_bytes, set_bytes)
    return {
        f"{way}.{key}": value
        for way in ("swap", "swap_undigested", "sop_path", "sop_path_undigested", "script_path")
        for key, value in {
            "seconds": medians[way],
            "over_placement": medians[way] / medians["placement"],
            "over_copy": medians[way] / medians["copy"],
            "over_engine_loader": medians[way] / medians["engine_loader"],
            "device_peak_over_set": peaks[way][0] / set_bytes,
            "rss_rise_over_checkpoint": peaks[way][1] / host_bytes,
        }.items()
    } | {
        f"{way}.over_{other}": medians[way] / medians[other]
        for way, other in (
            ("swap", "sop_path"),
            ("swap", "script_path"),
            ("swap", "swap_undigested"),
            ("sop_path", "sop_path_undigested"),
        )
    }


def _ways(engine: sglang.SglangEngine, directory: Path) -> dict[str, Run]:
    table = ParamTable(engine)
    leaves, blueprint = leaf_sources(engine, table), table.blueprint
    placed: dict[str, jax.Array | None] = dict.fromkeys(leaves)
    buffer = np.empty(max(array.size for array in open_checkpoint(directory).values()), np.uint16)

    def swap() -> None:
        weights.stream(engine, open_checkpoint(directory))

    # The others run on the scheduler's thread too; its loop would take the GIL now and then.
    def engine_loader() -> None:
        model = _abstract_model(engine)
        model.load_weights(engine.runner.model_config, jax.random.key(0))
        jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))

    def placement() -> None:
        checkpoint = open_checkpoint(directory)
        for path, leaf in leaves.items():
            placed[path] = None
            view = EngineView(checkpoint[leaf.source], leaf)[WHOLE[: len(blueprint[path].shape)]]
            placed[path] = jax.device_put(view, blueprint[path].sharding, may_alias=False)
        jax.block_until_ready(list(placed.values()))

    def copy() -> None:
        for array in open_checkpoint(directory).values():
            np.copyto(buffer[: array.size], array.view(np.uint16).ravel())

    def sop_path() -> None:
        tree = _materialised(tree_from_checkpoint(open_checkpoint(directory)))
        weights.swap(engine, weights.build(engine, hf_weights(tree)))

    def script_path() -> None:
        halves = {name: np.asarray(w, np.float16) for name, w in open_checkpoint(directory).items()}
        tree = _materialised(_in_bfloat16(tree_from_checkpoint(halves)))
        del halves
        weights.swap(engine, weights.build(engine, hf_weights(tree)))

    def undigested(run: Run) -> Run:
        def without() -> None:
            engine.proves_weights = False
            run()
            engine.proves_weights = True

        return without

    return {
        "swap": swap,
        "swap_undigested": undigested(swap),
        "engine_loader": lambda: engine.on_scheduler.call(engine_loader),
        "placement": lambda: engine.on_scheduler.call(placement),
        "copy": lambda: engine.on_scheduler.call(copy),
        "sop_path": sop_path,
        "sop_path_undigested": undigested(sop_path),
        "script_path": script_path,
    }


def _abstract_model(engine: sglang.SglangEngine) -> Any:
    """Return the model that the engine's own loader passes to ``load_weights``."""
    runner = engine.runner
    options = {"dtype": runner.dtype, "mesh": runner.mesh}
    if not compat.shards_explicitly():
        options["rngs"] = nnx.Rngs(0)
    with compat.use_mesh(runner.mesh):
        make = type(runner.model)
        return nnx.eval_shape(lambda: make(runner.model_config.hf_config, **options))


def _materialised(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree copied to fresh memory, kernels as [in, out], as from the script's loader."""
    return {
        name: _materialised(node) if isinstance(node, dict) else node.copy()
        for name, node in tree.items()
    }


def _in_bfloat16(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree in bfloat16, to which the script casts its float16 weights."""
    return {
        name: _in_bfloat16(node) if isinstance(node, dict) else node.astype(ml_dtypes.bfloat16)
        for name, node in tree.items()
    }


def _peaks(run: Run, set_bytes: int) -> tuple[int, int]:
    """Return the peak device bytes of parameters, and the rise of RSS, while it runs."""
    memory.give_back_host_memory()
    before = _memory()
    with PeakSampler(lambda: True, _SHARE) as sampler:
        sampler.begin(before)
        run()
        peak = sampler.take(_memory())
    if peak.error:
        raise RuntimeError(f"the peak is not known: {peak.error}")
    others = sum(stats["bytes_in_use"] for stats in before.jax_device_memory_stats) - set_bytes
    return peak.bytes_in_use_total - others, peak.process_rss_bytes - before.process_rss_bytes


def _memory() -> Memory:
    """Return the current memory of the devices and this process."""
    stats = [{"bytes_in_use": used} for used in memory.bytes_in_use()]
    return replace(process_memory(), jax_device_memory_stats=stats)


def _print_table(
    seconds: dict[str, float],
    peaks: dict[str, tuple[int, int]],
    host_bytes: int,
    set_bytes: int,
) -> None:
    print(f"checkpoint {host_bytes:,} bytes, on the devices {set_bytes:,}; {TURNS} turns, medians")
    print(f"{'way':20} {'seconds':>8} {'GB/s':>6} {'device peak':>12} {'RSS rise':>9}")
    for name, value in seconds.items():
        device, rss = peaks[name]
        print(
            f"{name:20} {value:8.3f} {host_bytes / value / 1e9:6.2f} "
            f"{device / set_bytes:11.3f}x {rss / host_bytes:8.3f}x"
        )
