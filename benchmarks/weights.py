"""Speed of transferring weights into a live engine, next to the limits of the machine.

All ways start from the same files in the page cache and are measured in turns. Memory is measured
in a separate turn, since sampling costs time. ``sop_path`` has two live sets and each time host
arrays that are of no file, bfloat16 throughout; ``script_path`` casts through float16, as the script
does that kvpipe replaces. ``swap_undigested`` and ``sop_path_undigested`` are the same without
digests of the weights.

The digests by themselves: of the parameters on the devices with programs to be compiled, with
programs that an earlier process has kept, and with programs at hand; and the first swap from a file,
which sums the file too.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from kvpipe.engine import compat, compile_cache, memory, sglang, weights
from kvpipe.engine.params import ParamTable
from kvpipe.engine.peaks import PeakSampler
from kvpipe.engine.weight_map import EngineView, leaf_sources
from kvpipe.records.run import Memory
from kvpipe.system.process_memory import process_memory

MODEL = TinyModel(  # the tensors of a 3B model, fewer layers: 0.33 GB in bfloat16
    hidden_size=2048,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=2,
    intermediate_size=11008,
    vocab_size=4096,
)
CACHE = cache_dir(Kvpipe())
TURNS = 3
_SHARE = 0.5  # share of the time for sampling; a sampled turn is not timed
WHOLE = (slice(None), slice(None))

_DIGESTED = ("swap", "sop_path")
_TIMED = (*_DIGESTED, "swap_undigested", "sop_path_undigested", "script_path")
_KEPT_BYTES = 1 << 30

Run = Callable[[], Any]


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU time of a run, in seconds; CPU time is summed over all cores."""

    seconds: float
    cpu_seconds: float


def measure() -> dict[str, float]:
    """Measure all ways, print a table, and return the ratios by key."""
    directory = ensure(MODEL, CACHE)
    with tempfile.TemporaryDirectory() as programs:
        compile_cache.keep_in(Path(programs), _KEPT_BYTES)
        engine = sglang.start(engine_config(1024), directory, idle_timeout_s=60.0)
        ways = _ways(engine, directory)
        digests = _costs_of_digests(engine, ways["swap"])
        costs = _costs_in_turns(ways)
        set_bytes = weights.live_bytes(engine)
        peaks = {name: _peaks(run, set_bytes) for name, run in ways.items()}
        engine.shut_down()
    host_bytes = sum(array.nbytes for array in open_checkpoint(directory).values())
    _print_table(costs, peaks, host_bytes, set_bytes)
    return digests | _ratios(costs) | _memory_ratios(peaks, host_bytes, set_bytes)


def _costs_of_digests(engine: sglang.SglangEngine, swap: Run) -> dict[str, float]:
    """Return CPU seconds of the digests by themselves, and of the first swap."""

    def take_digests() -> None:
        weights.take_digests(engine)

    compiled = _cost(take_digests)
    jax.clear_caches()  # what a process has that finds the programs of an earlier one
    loaded, again, first_swap = (_cost(run) for run in (take_digests, take_digests, swap))
    return {
        "digests.compiled_cpu_seconds": compiled.cpu_seconds,
        "digests.loaded_cpu_seconds": loaded.cpu_seconds,
        "digests.cpu_seconds": again.cpu_seconds,
        "first_swap.cpu_seconds": first_swap.cpu_seconds,
    }


def _costs_in_turns(ways: dict[str, Run]) -> dict[str, Cost]:
    """Return the medians of each way."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, run in ways.items():
            cost = _cost(run)
            if turn:  # the first turn is a warm-up
                costs[name].append(cost)
    return {
        name: Cost(
            statistics.median(cost.seconds for cost in found),
            statistics.median(cost.cpu_seconds for cost in found),
        )
        for name, found in costs.items()
    }


def _cost(run: Run) -> Cost:
    memory.give_back_host_memory()
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - began, time.process_time() - cpu_began)


def _ratios(costs: dict[str, Cost]) -> dict[str, float]:
    """Return each way on the clock, over the others and over the limits of the machine."""
    limits = ("placement", "copy", "engine_loader")
    others = {
        ("swap", "sop_path"),
        ("swap", "script_path"),
        *((way, f"{way}_undigested") for way in _DIGESTED),
        *((way, limit) for way in _TIMED for limit in limits),
    }
    return (
        {f"{way}.seconds": costs[way].seconds for way in _TIMED}
        | {f"{way}.cpu_seconds": costs[way].cpu_seconds for way in _TIMED}
        | {
            f"{way}.over_{other}": costs[way].seconds / costs[other].seconds
            for way, other in sorted(others)
        }
        | {
            f"{way}.cpu_over_undigested": costs[way].cpu_seconds
            / costs[f"{way}_undigested"].cpu_seconds
            for way in _DIGESTED
        }
    )


def _memory_ratios(
    peaks: dict[str, tuple[int, int]], host_bytes: int, set_bytes: int
) -> dict[str, float]:
    return {
        f"{way}.{key}": value
        for way in _TIMED
        for key, value in {
            "device_peak_over_set": peaks[way][0] / set_bytes,
            "rss_rise_over_checkpoint": peaks[way][1] / host_bytes,
        }.items()
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
    costs: dict[str, Cost],
    peaks: dict[str, tuple[int, int]],
    host_bytes: int,
    set_bytes: int,
) -> None:
    print(f"checkpoint {host_bytes:,} bytes, on the devices {set_bytes:,}; {TURNS} turns, medians")
    print(f"{'way':20} {'seconds':>8} {'CPU s':>7} {'GB/s':>6} {'device peak':>12} {'RSS rise':>9}")
    for name, cost in costs.items():
        device, rss = peaks[name]
        print(
            f"{name:20} {cost.seconds:8.3f} {cost.cpu_seconds:7.3f} "
            f"{host_bytes / cost.seconds / 1e9:6.2f} "
            f"{device / set_bytes:11.3f}x {rss / host_bytes:8.3f}x"
        )
