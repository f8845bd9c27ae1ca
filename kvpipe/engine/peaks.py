"""Sample the peak memory use within a phase, which a measurement after the phase cannot see.

A thread samples while the phase runs; code that knows when its use is highest calls :func:`mark`,
so that the peak does not depend on timing. Sampling allocates nothing on the devices, waits for
nothing there, and never raises into the phase: an error is recorded in the :class:`Peak`.
"""

import threading
import time
import traceback
from collections.abc import Callable, Sequence

from kvpipe.records.run import Memory, Peak
from kvpipe.system.periodic_thread import PeriodicThread
from kvpipe.system.process_memory import process_memory

# Not more often: each wake-up takes the GIL from the phase. Not less often: a peak may be short.
_LEAST_S, _MOST_S = 0.01, 2.0
_OWN_PEAK = "peak_bytes_in_use"

_sampler: "PeakSampler | None" = None


def mark() -> None:
    """Sample now, because the caller's memory use may be at its peak.

    Must not be called within :func:`kvpipe.engine.memory.uncounted`.
    """
    if _sampler is not None:
        _sampler.sample()


class PeakSampler:
    """Sample while the context is open; one instance at a time per process.

    ``has_devices`` says whether jax has initialised its devices; until then only RSS is sampled.
    ``share`` is the largest share of one core's time that sampling may use.
    """

    def __init__(self, has_devices: Callable[[], bool], share: float = 0.01) -> None:
        self._has_devices = has_devices
        self._share = share
        self._thread = PeriodicThread("peaks", self._sample_once)
        # Held for a whole sample, so that each sample belongs to one phase.
        self._lock = threading.Lock()
        self._reset(None)
        self.spent_s = 0.0

    def __enter__(self) -> "PeakSampler":
        global _sampler
        _sampler = self
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        global _sampler
        _sampler = None
        self._thread.stop()

    def begin(self, before: Memory | None) -> None:
        """Reset the samples at the start of a phase; ``before`` is the last measurement."""
        with self._lock:
            self._reset(before)

    def take(self, after: Memory) -> Peak:
        """Return the peak since :meth:`begin`; ``after`` is the measurement after the phase."""
        with self._lock:
            return _peak(self._before, self._seen, after, self._samples, self._error)

    def sample(self) -> None:
        """Take one sample."""
        with self._lock:
            try:
                self._take_one()
            except Exception as error:
                traceback.print_exc()
                self._error = f"{type(error).__name__}: {error}"

    def _sample_once(self) -> float:
        # CPU time of this thread: while it waits, the phase computes.
        began = time.thread_time()
        self.sample()
        spent = time.thread_time() - began
        self.spent_s += spent
        return min(max(spent / self._share, _LEAST_S), _MOST_S)

    def _take_one(self) -> None:
        rss = process_memory().process_rss_bytes
        used: tuple[int, ...] = ()
        if self._has_devices():
            from kvpipe.engine import memory

            used = memory.used_now()
        self._seen.add(used, rss)
        self._samples += 1

    def _reset(self, before: Memory | None) -> None:
        self._before = before
        self._seen = _Largest()
        self._samples = 0
        self._error: str | None = None


class _Largest:
    """The largest readings: on each device, summed over the devices at one moment, and of RSS."""

    def __init__(self) -> None:
        self.devices: tuple[int, ...] = ()
        self.total = 0
        self.rss = 0

    def add(self, devices: Sequence[int], rss: int) -> None:
        """Add a reading."""
        self.devices = _larger(self.devices, devices)
        self.total = max(self.total, sum(devices))
        self.rss = max(self.rss, rss)


def _larger(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Return the elementwise maximum; either reading may lack the devices."""
    if not a or not b:
        return tuple(a or b)
    return tuple(max(pair) for pair in zip(a, b, strict=True))


def _peak(
    before: Memory | None, seen: _Largest, after: Memory, samples: int, error: str | None
) -> Peak:
    """Return the peak of a phase, including the measurements before and after it."""
    for end in (before, after):
        if end is not None:
            seen.add(
                [d["bytes_in_use"] for d in end.jax_device_memory_stats], end.process_rss_bytes
            )
    devices = _larger(seen.devices, _risen(before, after))
    rss = after.process_peak_rss_bytes
    rss_risen = rss if before and rss > before.process_peak_rss_bytes else 0
    return Peak(
        bytes_in_use=devices,
        bytes_in_use_total=max(seen.total, *devices, 0),
        process_rss_bytes=max(seen.rss, rss_risen),
        samples=samples,
        source=after.bytes_in_use_source,
        error=error,
    )


def _risen(before: Memory | None, after: Memory) -> list[int]:
    """Return each device's peak from the backend where the phase raised it, else 0.

    The backend's peak is since the process began: if it did not rise, it is from an earlier phase.
    """
    now = [stats.get(_OWN_PEAK, 0) for stats in after.jax_device_memory_stats]
    if not now:  # the measurement itself has failed
        return []
    then = [stats.get(_OWN_PEAK, 0) for stats in before.jax_device_memory_stats] if before else []
    earlier = then or [0] * len(now)
    return [peak if peak > old else 0 for peak, old in zip(now, earlier, strict=True)]
