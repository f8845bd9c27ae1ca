"""A rehearsal of devices that count their bytes, as a TPU does, on virtual devices.

The statistics of the devices are replaced by ones that give every live array what libtpu gives it on
a TPU v4, and every compiled program some code. jax still computes on the CPU.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from kvpipe.config.jax_environment import cpu_environment
from kvpipe.records.run import PhaseRecord, RunPlanned, record_from_json
from tests import conftest
from tests.command import environment
from tests.helpers_config import ROOT, compose_plain, config_of

CHIPS = "v4:2x2x1"
CODE_BYTES = 12_345
"""Bytes of a program's code, here: no sum of padded arrays is a multiple of it."""
LIMIT_BYTES, RESERVED_BYTES = 4 << 30, 1 << 20
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Rehearsed:
    """Plan and records of a rehearsed run, and why it failed, if it did."""

    plan: RunPlanned
    records: Sequence[PhaseRecord]
    error: str | None


@contextmanager
def counting_devices() -> Iterator[None]:
    """Let this process's devices count by themselves, for what runs within the context."""
    import jax
    from jax._src import monitoring

    from kvpipe.engine import aot, memory, physical

    described = aot.described_device(CHIPS)
    programs = 0
    asking = threading.local()  # what only the compiler is asked takes no memory of a device
    shard_bytes = physical.shard_bytes

    def count(event: str, duration: float, **more: Any) -> None:
        nonlocal programs
        programs += event == _COMPILED and not hasattr(asking, "size")

    def asked(array: Any, device: Any) -> int:
        asking.size = True
        try:
            return shard_bytes(array, device)
        finally:
            del asking.size

    def device_stats() -> list[dict[str, int]]:
        with memory.uncounted():
            alive = memory._once(jax.live_arrays())
            given = memory.per_device(alive, jax.local_devices(), memory.given_bytes)
        used = [held + programs * CODE_BYTES for held in given]
        return [
            {
                "bytes_in_use": in_use,
                "bytes_limit": LIMIT_BYTES,
                "bytes_reserved": RESERVED_BYTES,
                "largest_free_block_bytes": LIMIT_BYTES - RESERVED_BYTES - in_use,
            }
            for in_use in used
        ]

    monitoring.register_event_duration_secs_listener(count)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(physical, "shard_bytes", asked)
            patch.setattr(memory, "counting_device", lambda: described)
            patch.setattr(memory, "device_stats", device_stats)
            yield
    finally:
        monitoring.unregister_event_duration_listener(count)


def main(*overrides: str) -> None:
    """Run the worker's steps of a config and print the lines of plan, records and ending.

    A process of its own: the next run would find what this one's engine leaves in its threads. What
    the compiler says of a shape is kept for the next one, as programs are.
    """
    from kvpipe.engine import physical
    from kvpipe.worker import loop, work

    callbacks = loop.Callbacks(
        joined=lambda hosts: None,
        planned=lambda plan: print(plan.line),
        started=lambda step, idx: None,
        progressed=lambda progress: None,
        sampled=lambda step, sample: None,
        finished=lambda record: print(record.line),
    )
    sizes_kept = physical.kept_in(Path(os.environ[conftest.PROGRAMS]))
    with counting_devices(), sizes_kept:
        ending = work.execute(config_of(compose_plain(*overrides)), callbacks, time.monotonic())
    print(json.dumps(asdict(ending)))


def run(directory: Path, experiment: str, *overrides: str, devices: int) -> Rehearsed:
    """Rehearse an experiment on devices, with few tokens, among which a pause finds its place."""
    few = ("sampling.max_new_tokens=16", "tracking=disabled", *overrides)
    few = (*few, f"engine.tp_size={devices}")
    inherited = environment(directory)
    done = subprocess.run(
        [sys.executable, "-m", "tests.rehearsal", f"+experiment={experiment}", *few],
        cwd=ROOT,
        env=inherited | cpu_environment(devices, inherited),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    plan, *records = [record_from_json(line) for line in lines[:-1]]
    assert isinstance(plan, RunPlanned)
    return Rehearsed(plan, [r for r in records if isinstance(r, PhaseRecord)], lines[-1]["error"])


if __name__ == "__main__":
    main(*sys.argv[1:])
