"""Phases that fail on purpose, in a copy of ``phases/`` beside which kvpipe is linked."""

import json
import shutil
import textwrap
from pathlib import Path

from tests.helpers_config import ROOT

CACHED = shutil.ignore_patterns("__pycache__")
PIPELINES = {
    "without_engine": ["wandb_init", "before", "fault", "after", "cleaning"],
    "in_the_parent": ["wandb_init", "fault_parent", "before"],
    "no_wandb": ["jax_ready", "fault", "after", "cleaning"],
    "on_the_engine": [
        *("wandb_init", "jax_ready", "engine_ready_dummy", "kv_cache_dropped"),
        *("fault", "after", "cleaning"),
    ],
    "before_the_engine": [
        *("wandb_init", "jax_ready", "fault", "engine_ready_dummy", "after", "cleaning"),
    ],
}
USED = {
    "before": "fault_changes",
    "fault": "fault_changes",
    "after": "fault_changes",
    "cleaning": "fault_cleans",
}
ON_FAILURE = {"changes": "STOP", "measures": "MAY_CONTINUE", "cleans": "ALWAYS_RUN"}
PHASE = '''
"""A phase of the tests."""
import what_goes_wrong
from kvpipe.pipeline.phase import Effect, OnFailure, Result, WorkerPhase


class Fault(WorkerPhase):
    how: str = "nothing"

    on_failure = OnFailure.{on_failure}

    def effect_given(self, before):
        what_goes_wrong.declare(self.how)
        return Effect()

    def run(self, ctx):
        return getattr(what_goes_wrong, self.how)(ctx) or Result()
'''
PARENT_PHASE = '''
"""A phase of the tests."""
from kvpipe.pipeline.phase import Effect, ParentPhase


class Fault(ParentPhase):
    effect = Effect()

    def run(self, ctx):
        raise ValueError("a fault of the tests")
'''
FAULTS = """
import ctypes
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvpipe.pipeline.phase import Result
from kvpipe.records.run import Check

WORKER_ID = Path("worker.pid")


def declare(how):
    # Both processes ask for a phase's effect; only the worker's command ends in a descriptor.
    if how == "hang_in_the_plan" and sys.argv[-1].isdecimal():
        hang()
    if how == "set_the_clock_back":
        hours = itertools.count()
        time.time = lambda now=time.time: now() - 3600 * next(hours)


def nothing(ctx):
    pass


def leave_a_mark(ctx):
    Path("mark").touch()


def exception(ctx):
    raise ValueError("a fault of the tests")


def set_the_clock_back(ctx):
    exception(ctx)


def exception_on_host_1(ctx):
    if ctx.config.engine.node_rank == 1:
        raise ValueError("a fault of the tests")


def more_bytes_on_host_1(ctx):
    import jax
    import jax.numpy as jnp

    if ctx.config.engine.node_rank == 1:
        ctx.slots["more"] = {"an array": jnp.zeros(25, device=jax.local_devices()[1])}


def failed_check(ctx):
    return Result({}, (Check("a check of the tests", 1, 2, False),))


def host_memory(ctx):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    bytearray(1 << 32)


def device_memory(ctx):
    import jax.numpy as jnp

    jnp.zeros(1 << 46).block_until_ready()


def eat_memory(ctx):
    held = []
    while True:
        held.append(os.urandom(1 << 24))


def abort(ctx):
    os.abort()


def segfault(ctx):
    ctypes.string_at(0)


def leave(ctx):
    os._exit(0)


def signal_worker():
    # The parent knows that this step has begun: the step would not run before.
    WORKER_ID.write_text(str(os.getpid()))


def wait(ctx):
    signal_worker()
    threading.Thread(target=time.sleep, args=(99,), name="a thread of the tests").start()
    hang()


def hang():
    time.sleep(99)


def wait_for_signal(ctx):
    # No event: the thread that waits for one holds its lock at times, and the handler runs on that one.
    received = []
    signal.signal(signal.SIGUSR2, lambda signum, _: received.append(signum))
    signal_worker()
    while ctx.engine_lives and not received:
        time.sleep(0.05)


def fill_disk(ctx):
    # The worker may be in this step before the parent has written the records of those before it.
    (records,) = Path("outputs/tiny").glob("*/records.jsonl")
    while '"phase": "before"' not in records.read_text():
        time.sleep(0.05)
    with Path("outputs/filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    # More than what the last page of the records' file, and what W&B deletes, have room for.
    return Result({"long": "x" * 100_000})


def child(ctx):
    code = "import time; time.sleep(99)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    subprocess.Popen([sys.executable, "-c", code])
    os.kill(os.getpid(), signal.SIGKILL)


def secrets():
    key = (Path.cwd() / ".env").read_text().partition("=")[2].strip()
    names = ("HF_TOKEN", "STORAGE_KEY", "DB_PASSWORD", "DATABASE_URL")
    return " and ".join([*(os.environ[name] for name in names), key])


def record_secrets(ctx):
    return Result({"fields": secrets(), secrets(): 1})


def print_secrets(ctx):
    print(f"a log with {secrets()}", flush=True)
    raise ValueError(secrets())


def spoil_the_model(ctx):
    ctx.model_dir = Path(os.environ["TMPDIR"])
    (ctx.model_dir / "config.json").write_text("{}")


def generate_while_dropped(ctx):
    ctx.engine.unavailable.clear()
    ctx.engine.generate("Hello", ctx.config.sampling)
"""


def write_site(directory: Path) -> None:
    """Write phases, the real ones too, for PYTHONPATH, and pipelines of them for --config-dir."""
    link_kvpipe(directory)
    for kind, on_failure in ON_FAILURE.items():
        path = directory / f"phases/fault_{kind}.py"
        path.write_text(PHASE.replace("{on_failure}", on_failure))
    (directory / "phases/fault_parent.py").write_text(PARENT_PHASE)
    (directory / "what_goes_wrong.py").write_text(textwrap.dedent(FAULTS))
    (directory / "mine/pipeline").mkdir(parents=True)
    for name, steps in PIPELINES.items():
        options = {step: {"use": USED[step]} for step in steps if step in USED}
        text = json.dumps({"pipeline": steps, "phases": options})
        (directory / f"mine/pipeline/{name}.yaml").write_text(f"# @package _global_\n{text}\n")


def link_kvpipe(directory: Path) -> None:
    """Link kvpipe and its configs into a directory, with a copy of the phases to add others to."""
    shutil.copytree(ROOT / "phases", directory / "phases", ignore=CACHED)
    for name in ("kvpipe", "conf"):
        (directory / name).symlink_to(ROOT / name)
