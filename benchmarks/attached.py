"""The verbs of an attached engine next to the phases that they run, and the cost of the import.

Both run on one engine, in turns. The phases get the same context as in a run: a heap whose objects
the garbage collector skips. CPU seconds of the process, since other processes may take the machine.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.devices import engine_config
from kvpipe.api.attached import Attached, attach, engine_patches
from kvpipe.checkpoints.safetensors import Tensors, open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.engine import memory, sglang
from kvpipe.pipeline.phase import result_of
from kvpipe.pipeline.phase_files import phase_class

_REPETITIONS = 7
_IMPORT = """
import time
began = time.perf_counter()
import kvpipe
print(time.perf_counter() - began)
"""


def measure() -> dict[str, float]:
    """Return the figures by key."""
    with tempfile.TemporaryDirectory() as directory:
        model_dir = ensure(TinyModel(), Path(directory))
        attached, named = attach(_engine(model_dir)), open_checkpoint(model_dir)
        figures = _figures(attached, named)
        attached._ctx.engine.shut_down()
    return figures | {"import_seconds": _import_seconds()}


def _engine(model_dir: Path) -> Any:
    from sgl_jax.srt.entrypoints.engine import Engine
    from sgl_jax.srt.server_args import ServerArgs

    config = engine_config(100_000)
    with engine_patches():
        return Engine(**sglang.server_arguments(config, model_dir, ServerArgs))


def _figures(attached: Attached, named: Tensors) -> dict[str, float]:
    ctx = attached._ctx
    ctx.hf_weights = lambda source: named

    def phases(*uses: str, **options: Any) -> None:
        for use in uses:
            result_of(phase_class(use)(step=use, **options), ctx)

    def release() -> None:
        with attached.kv_released():
            pass

    ways: dict[str, Callable[[], Any]] = {
        "kv.phases": lambda: phases("flush_cache", "kv_cache_dropped", "kv_cache_rebuilt"),
        "kv.attached": release,
        "sync.phases": lambda: phases("weights_streamed", probe_tokens=0),
        "sync.attached": lambda: attached.sync(named),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_REPETITIONS + 1):
        for name, run in ways.items():
            in_run = name.endswith(".phases")
            memory.exclude_what_lives() if in_run else memory.collect_garbage()
            began = time.process_time()
            run()
            if turn:  # the first turn is a warm-up
                seconds[name].append(time.process_time() - began)
            gc.unfreeze()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {f"attached.{name}_cpu_seconds": value for name, value in medians.items()} | {
        f"attached.{verb}_extra_cpu_seconds": medians[f"{verb}.attached"]
        - medians[f"{verb}.phases"]
        for verb in ("kv", "sync")
    }


def _import_seconds() -> float:
    times = []
    for _ in range(_REPETITIONS):
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, check=True)
        times.append(float(done.stdout))
    return min(times)
