"""The memory probe: what is on the devices and in this process after a phase.

It runs in the worker between phases, with the engine idle and the devices synchronised.
"""

from dataclasses import dataclass

from kvpipe.context import WorkerContext
from kvpipe.ledger import Ledger
from kvpipe.process_memory import process_memory
from kvpipe.records import Memory


@dataclass(frozen=True)
class Measurement:
    """What the probe found.

    Attributes:
        memory: for the record.
        ledger: bytes per device, by pool; None before jax runs.
    """

    memory: Memory
    ledger: Ledger | None


def measure(ctx: WorkerContext) -> Measurement:
    """Measure the devices and this process."""
    if not ctx.jax_ready:
        return Measurement(process_memory(), None)
    from kvpipe.engine import kv_cache, memory, weights

    engine = ctx.started
    if engine is not None:
        engine.wait_idle()
    ledger = memory.measure(
        params=weights.parameters(engine).values() if engine else (),
        kv=kv_cache.buffers(engine) if engine else (),
        slots={name: arrays.values() for name, arrays in ctx.slots.items()},
    )
    stats = memory.device_stats()
    source = "device"
    if stats is None:
        source = "live_arrays"
        stats = [{"bytes_in_use": used} for used in ledger.per_device]
    process = process_memory()
    return Measurement(
        Memory(process.process_rss_bytes, process.process_peak_rss_bytes, stats, source), ledger
    )
