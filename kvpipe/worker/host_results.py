"""Merge the hosts' measurements of a step into one ledger over all devices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpipe.pipeline.ledger import Ledger
from kvpipe.records.run import Check, Memory, Peak
from kvpipe.worker.measurement import Measurement


@dataclass(frozen=True)
class Share:
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


def together(shares: Sequence[Share], labels: Sequence[str]) -> Share:
    """Merge all hosts' results: rank 0's, with every host's devices and failed checks.

    Args:
        shares: each host's result, by rank.
        labels: the hosts' names in messages.
    """
    first, *others = shares
    if not others:
        return first
    failed = [
        replace(check, detail=f"on {label}{check.detail and ': '}{check.detail}")
        for share, label in zip(others, labels[1:], strict=True)
        for check in share.checks
        if not check.passed
    ]
    return Share(
        measured=Measurement(_memory(shares), _ledger(shares)),
        peak=_peak(shares),
        checks=(*first.checks, *failed),
        engine_lives=all(share.engine_lives for share in shares),
    )


def of_each_host(shares: Sequence[Share], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the record's entry for each host."""
    return [
        {
            "name": name,
            "process_rss_bytes": share.measured.memory.process_rss_bytes,
            "process_peak_rss_bytes": share.measured.memory.process_peak_rss_bytes,
            "devices": share.positions,
            "ledger": share.measured.ledger.totals() if share.measured.ledger else {},
        }
        for share, name in zip(shares, names, strict=True)
    ]


def _in_order[T](shares: Sequence[Share], of_host: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """Return the hosts' per-device values in the order of all devices."""
    pairs = [
        pair
        for share, values in zip(shares, of_host, strict=True)
        for pair in zip(share.positions, values, strict=True)
    ]
    return tuple(value for _, value in sorted(pairs, key=lambda pair: pair[0]))


def _memory(shares: Sequence[Share]) -> Memory:
    stats = [share.measured.memory.jax_device_memory_stats for share in shares]
    placed = _in_order(shares, stats) if all(stats) else ()
    return replace(shares[0].measured.memory, jax_device_memory_stats=placed)


def _ledger(shares: Sequence[Share]) -> Ledger | None:
    """Return the ledger over all devices; None if a host could not measure."""
    ledgers = [share.measured.ledger for share in shares if share.measured.ledger]
    if len(ledgers) != len(shares):
        return None
    whole = Ledger(sum(ledger.devices for ledger in ledgers))
    for pool in dict.fromkeys(pool for ledger in ledgers for pool in ledger.pools):
        held = _in_order(shares, [ledger.of(pool) for ledger in ledgers])
        whole = whole.with_pool(pool, held)
    return whole


def _peak(shares: Sequence[Share]) -> Peak | None:
    """Return the peak: each device's own, and the sum over the hosts of each host's largest total.

    The hosts may have reached their largest totals at different moments.
    """
    peaks = [share.peak for share in shares if share.peak]
    if len(peaks) != len(shares):
        return None
    used = [peak.bytes_in_use for peak in peaks]
    return replace(
        peaks[0],
        bytes_in_use=_in_order(shares, used) if all(used) else (),
        bytes_in_use_total=sum(peak.bytes_in_use_total for peak in peaks),
        error=next((peak.error for peak in peaks if peak.error), None),
    )
