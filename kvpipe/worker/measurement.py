"""The memory probe: measure the devices and this process after a phase.

It runs in the worker between phases, with the engine idle and the devices synchronised.
"""

from dataclasses import dataclass, replace

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.ledger import Ledger
from kvpipe.records.run import Memory
from kvpipe.system.process_memory import process_memory


@dataclass(frozen=True)
class Measurement:
    """Memory after a phase, for the record, and the ledger, which is None before jax runs."""

    memory: Memory
    ledger: Ledger | None


def measure(ctx: WorkerContext, settle: bool = True) -> Measurement:
    """Measure the devices and this process.

    With ``settle`` wait until the engine is idle; after a failure it may never be.

    Raises:
        EngineError: the engine failed or stayed busy, with ``settle``.
    """
    if not ctx.jax_ready:
        return Measurement(process_memory(), None)
    from kvpipe.engine import kv_cache, memory, weights

    engine = ctx.started
    if engine is not None and settle:
        engine.wait_idle()
    ledger = memory.measure(
        params=weights.parameters(engine).values() if engine else (),
        kv=kv_cache.buffers(engine) if engine else (),
        slots={name: arrays.values() for name, arrays in ctx.slots.items()}
        | (ctx.made_trainer.sets if ctx.made_trainer else {}),
    )
    stats = memory.device_stats()
    source = "device"
    if stats is None:
        source = "live_arrays"
        stats = [{"bytes_in_use": used} for used in ledger.per_device]
    process = process_memory()
    return Measurement(
        replace(process, jax_device_memory_stats=stats, bytes_in_use_source=source), ledger
    )
