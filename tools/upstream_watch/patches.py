"""Test whether the installed sglang-jax still has the defects that the adapter patches."""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

NEEDED, NOT_NEEDED = "needed", "not needed"
_GENERATE_WITHOUT = """
import sys
from contextlib import nullcontext
from pathlib import Path
from kvpipe.engine import compat, sglang
from tools.upstream_watch.exercise import CONFIG
from kvpipe.config.schema import SamplingConfig
setattr(compat, sys.argv[1], nullcontext)
try:
    engine = sglang.start(CONFIG, Path(sys.argv[2]), 120.0)
    engine.generate("Hello", SamplingConfig(max_new_tokens=2))
except Exception as error:
    import os
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(9)
engine.shut_down()
"""
_DEFECT = 9
_OPEN_SOCKET_IN_GARBAGE = """
import gc
import zmq
from types import SimpleNamespace
context = zmq.Context()
garbage = SimpleNamespace(context=context, socket=context.socket(zmq.PUSH))
garbage.itself = garbage
del garbage, context
gc.collect()
"""


def needed(model_dir: Path) -> dict[str, str]:
    """Return for each patch whether its defect is still there, and the evidence."""
    return {name: probe(model_dir) for name, probe in PROBES.items()}


def _works_without(name: str) -> Callable[[Path], str]:
    """Return a probe that generates with an engine without the patch, in a separate process."""

    def probe(model_dir: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _GENERATE_WITHOUT, name, str(model_dir)],
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode == 0:
            return f"{NOT_NEEDED}: an engine generates without it"
        if done.returncode != _DEFECT:
            raise RuntimeError(
                f"the probe of {name} ended with {done.returncode}: {done.stderr[-300:]}"
            )
        reason = " ".join(done.stdout.splitlines()[-1].split())[:160]
        return f"{NEEDED}: without it {reason}"

    return probe


def _config_is_cached(model_dir: Path) -> str:
    from sgl_jax.srt import hf_transformers_utils

    first, second = (
        hf_transformers_utils.get_config(str(model_dir), trust_remote_code=False) for _ in range(2)
    )
    if first is second:
        return f"{NEEDED}: two readers of a model's config get the same object"
    return f"{NOT_NEEDED}: each reader of a model's config gets its own"


def _seeded_noise_is_biased(model_dir: Path) -> str:
    import jax.numpy as jnp
    import numpy as np

    many = 65_536
    shares = np.array([0.42, 0.25, 0.15, 0.1, 0.05, 0.03], np.float32)
    logits = jnp.broadcast_to(jnp.log(shares), (many, len(shares)))
    operands = (logits, jnp.arange(many), jnp.full(many, 77), None)
    tokens = np.asarray(_unpatched_sampler().multinomial_with_seed(operands)).ravel()
    counts, expected = np.bincount(tokens, minlength=len(shares)), many * shares
    ratio = float(((counts - expected) ** 2 / expected).sum() / (len(shares) - 1))
    found = f"over {many:,} seeds chi-squared is {ratio:.0f} times its degrees of freedom"
    return f"{NEEDED if ratio > 10 else NOT_NEEDED}: {found}"


def _min_p_is_of_logits(model_dir: Path) -> str:
    import jax.numpy as jnp

    operands = (jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0.5]))
    first, second, third = _unpatched_sampler()._apply_min_p_filter(operands)[0].tolist()
    if third < second < first:
        return f"{NOT_NEEDED}: min_p leaves out the right tokens"
    return f"{NEEDED}: of 0.5, 0.3 and 0.2 a min_p of 0.5 gives {first:g}, {second:g}, {third:g}"


def _unpatched_sampler() -> Any:
    """Return a copy of the sampler's module; the adapter may have patched the other in this process."""
    found = util.find_spec("sgl_jax.srt.layers.sampler")
    assert found is not None
    assert found.loader is not None
    sampler = util.module_from_spec(found)
    found.loader.exec_module(sampler)
    return sampler


def _kernel_calls_bit_width(model_dir: Path) -> str:
    from jax._src import dtypes

    calls = [
        f"{path.name}:{number}"
        for path in _sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "dtypes.bit_width(" in line and "hasattr" not in line
    ]
    # The patch itself may have been applied in this process.
    own = getattr(getattr(dtypes, "bit_width", None), "__name__", "") == "bit_width"
    if calls and not own:
        return f"{NEEDED}: jax has no dtypes.bit_width, which {', '.join(calls)} calls"
    return f"{NOT_NEEDED}: " + ("jax has dtypes.bit_width" if own else "nothing calls it unasked")


def _kernel_asks_jax_for_devices(model_dir: Path) -> str:
    asking = [
        f"{path.name}: {node.name}"
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.name in ("get_tpu_version", "get_device_name")
        and "jax.devices()" in ast.unparse(node)
    ]
    if asking:
        return f"{NEEDED}: the kernel looks its chip up in jax.devices() ({'; '.join(asking)})"
    return f"{NOT_NEEDED}: no kernel looks its chip up in jax.devices()"


def _engine_kills_its_process(model_dir: Path) -> str:
    from sgl_jax.srt.entrypoints import engine

    if hasattr(engine, "kill_process_tree"):
        return f"{NEEDED}: the engine's module has kill_process_tree"
    return f"{NOT_NEEDED}: the engine's module has no kill_process_tree"


def _threads_signal_the_parent(model_dir: Path) -> str:
    texts = {path: path.read_text(encoding="utf-8") for path in _sources()}
    signalling = [p.name for p, t in texts.items() if ".parent()" in t and "SIGQUIT" in t]
    if signalling:
        return f"{NEEDED}: SIGQUIT to the parent process is in {', '.join(signalling)}"
    return f"{NOT_NEEDED}: nothing sends SIGQUIT to the parent process"


def _engine_reaps_any_child(model_dir: Path) -> str:
    from sgl_jax.srt.entrypoints import engine

    if "os.waitpid(0," in Path(engine.__file__).read_text("utf-8"):
        return f"{NEEDED}: the engine's handler of SIGCHLD waits for any child"
    return f"{NOT_NEEDED}: the engine waits for no child but its own"


def _watchdog_has_no_end(model_dir: Path) -> str:
    from sgl_jax.srt.managers.scheduler import Scheduler

    if "while True:" in inspect.getsource(Scheduler.watchdog_thread):
        return f"{NEEDED}: the scheduler's watchdog ends only with the process"
    return f"{NOT_NEEDED}: the scheduler's watchdog has an end"


def _scheduler_starts_the_runtime(model_dir: Path) -> str:
    from sgl_jax.srt.managers import scheduler

    if "jax.distributed.initialize(" in Path(scheduler.__file__).read_text("utf-8"):
        return f"{NEEDED}: the scheduler starts jax's distributed runtime"
    return f"{NOT_NEEDED}: the scheduler does not start jax's distributed runtime"


def _other_hosts_get_no_scheduler(model_dir: Path) -> str:
    from sgl_jax.srt.entrypoints import engine

    if "return None, None, None" in Path(engine.__file__).read_text("utf-8"):
        return f"{NEEDED}: the engine's constructor gives hosts after the first no scheduler"
    return f"{NOT_NEEDED}: the engine's constructor gives every host its scheduler"


def _garbage_waits_for_itself(model_dir: Path) -> str:
    try:
        subprocess.run([sys.executable, "-c", _OPEN_SOCKET_IN_GARBAGE], check=True, timeout=10)
    except subprocess.TimeoutExpired:
        return f"{NEEDED}: a context and its open socket, both garbage, are never collected"
    return f"{NOT_NEEDED}: a context and its open socket are collected"


def _prefill_is_bounded_by_its_chunk(model_dir: Path) -> str:
    from sgl_jax.srt.managers.schedule_policy import PrefillAdder

    texts = [
        "".join(inspect.getsource(method).split())
        for method in vars(PrefillAdder).values()
        if inspect.isfunction(method)
    ]
    if any("rem_chunk_tokens_listisNoneandreal_input_tokens>=" in text for text in texts):
        return f"{NEEDED}: with chunks, a prefill's batch is not bounded by max_prefill_tokens"
    return f"{NOT_NEEDED}: every prefill's batch is bounded by max_prefill_tokens"


def _page_table_is_shared(model_dir: Path) -> str:
    if found := [
        path.name for path in _sources() if "cache_loc_host_buf" in path.read_text("utf-8")
    ]:
        return f"{NEEDED}: all batches share an array for their page tables in {', '.join(found)}"
    return f"{NOT_NEEDED}: each batch makes its page table"


def _sources() -> Iterator[Path]:
    import sgl_jax

    for root in sgl_jax.__path__:
        yield from sorted(Path(root).rglob("*.py"))


PROBES: dict[str, Callable[[Path], str]] = {
    "pytree_registered_twice": _works_without("pytree_registered_twice"),
    "sampler_off_tpu": _works_without("sampler_off_tpu"),
    "seeded_sampling_is_random": _seeded_noise_is_biased,
    "min_p_of_probabilities": _min_p_is_of_logits,
    "prefill_within_its_program": _prefill_is_bounded_by_its_chunk,
    "page_table_of_each_batch_is_its_own": _page_table_is_shared,
    "config_of_each_engine_is_its_own": _config_is_cached,
    "bit_width_of_dtypes": _kernel_calls_bit_width,
    "kernel_sees": _kernel_asks_jax_for_devices,
    "failure_signals_stay_here": _threads_signal_the_parent,
    "exit_statuses_are_for_who_waits": _engine_reaps_any_child,
    "watchdog_ends_with_its_engine": _watchdog_has_no_end,
    "failure_does_not_kill": _engine_kills_its_process,
    "starts_no_second_runtime": _scheduler_starts_the_runtime,
    "scheduler_of_any_host": _other_hosts_get_no_scheduler,
    "contexts_stay_open": _garbage_waits_for_itself,
}
"""Patch → test for its defect; every patch must have one."""
