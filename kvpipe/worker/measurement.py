"""The memory probe: measure the devices and this process after a phase.

It runs in the worker between phases, with the engine idle and the devices synchronised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.ledger import UNOWNED, Ledger
from kvpipe.records.run import Memory
from kvpipe.system.process_memory import process_memory


@dataclass(frozen=True)
class Measurement:
    """Memory after a phase.

    Attributes:
        memory: for the record.
        ledger: bytes per device, by pool; None before jax runs.
        other: bytes of the pool ``other`` over all devices, by owner.
        unowned: the arrays in it that have no owner, each in words.
    """

    memory: Memory
    ledger: Ledger | None
    other: Mapping[str, int] = field(default_factory=dict)
    unowned: tuple[str, ...] = ()


def settle(ctx: WorkerContext) -> None:
    """Wait until the engine is idle and every array is there, so that all work of a phase is done.

    Raises:
        EngineError: the engine failed or stayed busy.
    """
    if not ctx.jax_ready:
        return
    from kvpipe.engine import memory

    if ctx.started is not None:
        ctx.started.wait_idle()
    memory.wait_for_arrays()


def measure(ctx: WorkerContext, describes: bool = True) -> Measurement:
    """Measure the devices and this process, as a rule once they are settled.

    With ``describes`` put the arrays that have no owner into words, which takes time.
    """
    if not ctx.jax_ready:
        return Measurement(process_memory(), None)
    from kvpipe.engine import memory

    # A collection takes longer than all the rest. An array that garbage holds has no owner, so it can
    # wait for one that has none; but compiled code that garbage holds is in no list, so where devices
    # count it too, garbage is collected each time.
    counts_itself = memory.device_stats() is not None
    found = None if counts_itself else _attributed(ctx, describes, collect=False)
    ledger, other, described = found or _attributed(ctx, describes, collect=True)
    stats = memory.device_stats()
    source = "device"
    if stats is None:
        source = "live_arrays"
        stats = [{"bytes_in_use": used} for used in ledger.per_device]
    process = process_memory()
    return Measurement(
        replace(process, jax_device_memory_stats=stats, bytes_in_use_source=source),
        ledger,
        other,
        described,
    )


def _attributed(ctx: WorkerContext, describes: bool, collect: bool) -> Any:
    """Return the ledger, the bytes of each owner, and the arrays that have none, in words.

    Return None without ``collect`` if an array has no owner: garbage may hold it. In that case no
    reference to an array is kept.
    """
    from kvpipe.engine import kv_cache, memory, owners, weights

    engine = ctx.started
    ledger, unpooled = memory.measure(
        params=weights.parameters(engine).values() if engine else (),
        kv=kv_cache.buffers(engine) if engine else (),
        slots={name: arrays.values() for name, arrays in ctx.slots.items()}
        | (ctx.made_trainer.sets if ctx.made_trainer else {}),
        collect=collect,
    )
    other: dict[str, int] = {}
    unowned = [group[0] for group in unpooled]
    if ctx.owners:
        other, unowned = ctx.owners.attribute(unpooled)
    if unowned and not collect:
        return None
    described = owners.describe(unowned, unpooled) if describes else ()
    if unowned:
        other[UNOWNED] = sum(memory.bytes_of(unowned))
    return ledger, other, described
