"""The summary of a phase: one row of figures for the terminal, the page and the pictures."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvpipe.pipeline.ledger import KV, OTHER, PARAMS, PROGRAM, TRAINER_PROGRAM, slot_pool
from kvpipe.records.run import PhaseRecord


@dataclass(frozen=True)
class PoolSizes:
    """Bytes by the kinds of pools that a summary has columns for; None for no such pool."""

    params: int | None
    kv: int | None
    slots: int | None
    programs: int | None
    other: int | None
    total: int | None


@dataclass(frozen=True)
class PhaseRow:
    """The figures of a finished phase, sizes in bytes over all devices; None is unknown.

    Attributes:
        held: live arrays after it.
        in_use: bytes in use after it, as the devices count them if they do.
        peak, rss_peak: the most bytes in use, and the most resident memory, inside it.
        compile_s: seconds of its compilations, on all threads.
        elapsed_s: seconds from the start of the run to its end.
        checks, checks_held: number of its checks, and of those that hold.
    """

    step: str
    seconds: float
    held: PoolSizes
    in_use: int
    peak: int | None
    rss: int
    rss_peak: int | None
    compilations: int
    compile_s: float
    elapsed_s: float
    checks: int
    checks_held: int

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return self.checks_held == self.checks


def phase_row(record: PhaseRecord) -> PhaseRow:
    """Return the row of a record."""
    held = pool_sizes(record.ledger)
    peak, memory = record.peak, record.memory
    counted = memory.jax_device_memory_summary.get("bytes_in_use_sum", 0)
    return PhaseRow(
        step=record.phase,
        seconds=record.duration_s,
        held=held,
        in_use=max(held.total or 0, counted),
        peak=peak.bytes_in_use_total if peak and peak.bytes_in_use else None,
        rss=memory.process_rss_bytes,
        rss_peak=peak.process_rss_bytes if peak else None,
        compilations=record.compilations,
        compile_s=record.compile_s,
        elapsed_s=record.elapsed_s,
        checks=len(record.checks),
        checks_held=sum(check.passed for check in record.checks),
    )


def pool_sizes(pools: Mapping[str, int]) -> PoolSizes:
    """Return the bytes of a ledger by kind of pool."""

    def of(*names: str) -> int | None:
        sizes = [pools[name] for name in names if name in pools]
        return sum(sizes) if sizes else None

    slots = [name for name in pools if name.startswith(slot_pool(""))]
    return PoolSizes(
        params=of(PARAMS),
        kv=of(KV),
        slots=of(*slots),
        programs=of(PROGRAM, TRAINER_PROGRAM),
        other=of(OTHER),
        total=of(*pools),
    )
