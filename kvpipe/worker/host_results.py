"""Merge the hosts' measurements of a step into one ledger over all devices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpipe.pipeline.ledger import Ledger
from kvpipe.records.run import Check, Memory, Peak
from kvpipe.worker.measurement import Measurement


@dataclass(frozen=True)
class HostResult:
    """One host's measurements and checks of a step, or all hosts' merged.

    Attributes:
        measured: memory after it, of the host's own devices.
        peak: peak use inside it; None if it was not sampled.
        checks: its assertions.
        engine_lives: whether no thread of the engine has failed.
        positions: positions of the host's devices in the list of all devices.
    """

    measured: Measurement
    peak: Peak | None = None
    checks: tuple[Check, ...] = ()
    engine_lives: bool = True
    positions: tuple[int, ...] = ()


def merge(results: Sequence[HostResult], labels: Sequence[str]) -> HostResult:
    """Merge the hosts' results, given by rank, into rank 0's with all devices and failed checks."""
    first, *others = results
    if not others:
        return first
    failed = [
        replace(check, detail=f"on {label}{check.detail and ': '}{check.detail}")
        for result, label in zip(others, labels[1:], strict=True)
        for check in result.checks
        if not check.passed
    ]
    return HostResult(
        measured=Measurement(
            _memory(results), _ledger(results), _other(results), _unowned(results, labels)
        ),
        peak=_peak(results),
        checks=(*first.checks, *failed),
        engine_lives=all(result.engine_lives for result in results),
    )


def per_host(results: Sequence[HostResult], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the record's entry for each host."""
    return [
        {
            "name": name,
            "process_rss_bytes": result.measured.memory.process_rss_bytes,
            "process_peak_rss_bytes": result.measured.memory.process_peak_rss_bytes,
            "devices": result.positions,
            "ledger": result.measured.ledger.totals() if result.measured.ledger else {},
        }
        for result, name in zip(results, names, strict=True)
    ]


def _in_order[T](results: Sequence[HostResult], of_host: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """Return the hosts' per-device values in the order of all devices."""
    pairs = [
        pair
        for result, values in zip(results, of_host, strict=True)
        for pair in zip(result.positions, values, strict=True)
    ]
    return tuple(value for _, value in sorted(pairs, key=lambda pair: pair[0]))


def _memory(results: Sequence[HostResult]) -> Memory:
    stats = [result.measured.memory.jax_device_memory_stats for result in results]
    placed = _in_order(results, stats) if all(stats) else ()
    return replace(results[0].measured.memory, jax_device_memory_stats=placed)


def _ledger(results: Sequence[HostResult]) -> Ledger | None:
    """Return the ledger over all devices; None if a host could not measure."""
    ledgers = [result.measured.ledger for result in results if result.measured.ledger]
    if len(ledgers) != len(results):
        return None
    whole = Ledger(sum(ledger.devices for ledger in ledgers))
    for pool in dict.fromkeys(pool for ledger in ledgers for pool in ledger.pools):
        held = _in_order(results, [ledger.of(pool) for ledger in ledgers])
        whole = whole.with_pool(pool, held)
    return whole


def _other(results: Sequence[HostResult]) -> dict[str, int]:
    """Return the bytes of each owner over all hosts."""
    owners = [result.measured.other for result in results]
    names = dict.fromkeys(name for sizes in owners for name in sizes)
    return {name: sum(sizes.get(name, 0) for sizes in owners) for name in names}


def _unowned(results: Sequence[HostResult], labels: Sequence[str]) -> tuple[str, ...]:
    """Return every host's arrays without an owner, with the host's name."""
    return tuple(
        f"on {label}: {array}"
        for result, label in zip(results, labels, strict=True)
        for array in result.measured.unowned
    )


def _peak(results: Sequence[HostResult]) -> Peak | None:
    """Return the peak: each device's own, and the sum over the hosts of each host's largest total.

    The hosts may have reached their largest totals at different moments.
    """
    peaks = [result.peak for result in results if result.peak]
    if len(peaks) != len(results):
        return None
    used = [peak.bytes_in_use for peak in peaks]
    return replace(
        peaks[0],
        bytes_in_use=_in_order(results, used) if all(used) else (),
        bytes_in_use_total=sum(peak.bytes_in_use_total for peak in peaks),
        error=next((peak.error for peak in peaks if peak.error), None),
    )
