"""The pictures of a run: memory on all devices, on each device, and on the host."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvpipe.pipeline.cycles import cycle_of
from kvpipe.records.run import PhaseRecord
from kvpipe.report.chart import Bar, Chart, Part, Row
from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.report.palette import Key, pool_keys, pool_roles
from kvpipe.report.run import Run
from kvpipe.units import counted, sized

# Bytes that the devices count beyond the live arrays: compiled programs, the runtime's own.
BEYOND_ARRAYS = "in use beyond arrays"
_PLANNED = "planned"
_DEVICE_HEIGHT = 74


def memory_chart(run: Run) -> Chart:
    """Return the memory timeline: pools after each phase, measured above planned.

    A dense chart shows planned bytes only for phases that were not reached.
    """
    roles = pool_roles([*run.pools, BEYOND_ARRAYS])
    done = {phase.phase for phase in run.phases}
    rows = [_chart_row(phase, _memory_bars(run, phase, roles)) for phase in run.phases]
    rows += [
        Row(name, [pools_bar(phase.pools, roles, _PLANNED)], "quiet", _group(name))
        for name, phase in run.plan.items()
        if name not in done
    ]
    return Chart(
        title=f"Device memory after each phase of {run.experiment}",
        description=_memory_description(run),
        rows=rows,
        limit=limit_bytes(run),
    )


def memory_keys(run: Run) -> list[Key]:
    """Return the legend of the memory timeline."""
    beyond = any(_beyond_arrays(phase) for phase in run.phases)
    keys = pool_keys([*run.pools, *([BEYOND_ARRAYS] if beyond else [])])
    if run.planned:
        said = "pale: planned, not reached" if memory_chart(run).dense else "thin and pale: planned"
        keys.append(Key("pool-total", said, "thin"))
    if any(phase.peak_bytes for phase in run.phases):
        keys.append(Key("peak", "whisker and (bytes): peak inside the phase, sampled", "whisker"))
    return keys


def host_chart(run: Run) -> Chart:
    """Return the resident memory of the process after each phase."""
    most = max((phase.memory.process_rss_bytes for phase in run.phases), default=0)
    return Chart(
        title=f"Host memory after each phase of {run.experiment}",
        description=f"Resident set of the process that ran each phase; the largest is "
        f"{sized(most)}.",
        rows=[_chart_row(phase, [_host_bar(phase)]) for phase in run.phases],
    )


def limit_bytes(run: Run) -> int | None:
    """Return the capacity of all devices together; None if unknown."""
    for phase in run.phases:
        if limit := phase.memory.jax_device_memory_summary.get("bytes_limit_sum"):
            return limit
    return run.planned.fit.hbm_bytes * run.planned.devices if run.planned else None


def _host_bar(phase: PhaseRecord) -> Bar:
    resident = Part("resident", "pool-host", phase.memory.process_rss_bytes)
    return Bar([resident], "host", peak=phase.peak.process_rss_bytes if phase.peak else None)


def _beyond_arrays(phase: PhaseRecord) -> int:
    return phase.bytes_in_use - sum(phase.ledger.values())


def _memory_bars(run: Run, phase: PhaseRecord, roles: Mapping[str, str]) -> Iterator[Bar]:
    measured = {**phase.ledger, BEYOND_ARRAYS: _beyond_arrays(phase)}
    yield pools_bar(measured, roles, "measured", phase.peak_bytes)
    if phase.phase in run.plan:
        yield pools_bar(run.plan[phase.phase].pools, roles, _PLANNED)


def pools_bar(
    pools: Mapping[str, int],
    roles: Mapping[str, str],
    name: str,
    peak: int | None = None,
    lettered: bool = False,
) -> Bar:
    """Return a bar of pools in the order of the whole chart's ``roles``; a planned one is thin."""
    parts = [Part(pool, role, pools[pool]) for pool, role in roles.items() if pools.get(pool)]
    return Bar(parts, name, thin=name == _PLANNED, peak=peak, lettered=lettered)


def _chart_row(phase: PhaseRecord, bars: Iterable[Bar]) -> Row:
    return Row(phase.phase, list(bars), "ink" if phase.passed else "bad", _group(phase.phase))


def _group(step: str) -> str:
    return f"cycle {cycle_of(step)}"


def _memory_description(run: Run) -> str:
    if not run.phases:
        return "No phase has finished."
    fullest = max(run.phases, key=lambda phase: phase.bytes_in_use)
    last = run.phases[-1]
    return (
        f"A bar for each of {counted(len(run.phases), 'phase')}, stacked by pool. The most after a phase is "
        f"{sized(fullest.bytes_in_use)}, after {fullest.phase}; at the end, after {last.phase}, it "
        f"is {sized(last.bytes_in_use)}. The table of planned and actual bytes has every number."
    )


@dataclass(frozen=True)
class DevicesChart:
    """One small chart a device; ``series`` has for each its bytes in use after each phase."""

    experiment: str
    series: Sequence[Sequence[int]]

    @classmethod
    def of(cls, run: Run) -> "DevicesChart":
        """Return the chart of a run; phases without statistics of the devices are left out."""
        stats = [phase.memory.jax_device_memory_stats for phase in run.phases]
        measured = [
            [device["bytes_in_use"] for device in devices]
            for devices in stats
            if devices and all("bytes_in_use" in device for device in devices)
        ]
        series = list(zip(*measured, strict=True)) if measured else []
        return cls(run.experiment, series)

    def drawn(self, width: float) -> Drawing:
        """Return the chart as a drawing of this width."""
        most = max(map(max, self.series)) or 1
        columns = max(1, int(width // 230))
        cell = width / columns
        shapes: list[Shape] = []
        for device, values in enumerate(self.series):
            x, y = device % columns * cell, device // columns * _DEVICE_HEIGHT
            peak = f"device {device}: at most {sized(max(values))}"
            shapes.append(Text(x, y + 14, peak, "ink", size=12.5))
            shapes += _columns(values, most, x, y + 22, cell - 16)
        return Drawing(
            width,
            ((len(self.series) + columns - 1) // columns) * _DEVICE_HEIGHT,
            f"Bytes in use of each device of {self.experiment}",
            "; ".join(f"device {d}: at most {max(v):,} bytes" for d, v in enumerate(self.series)),
            shapes,
        )


def _columns(values: Sequence[int], most: int, x: float, y: float, width: float) -> Iterator[Shape]:
    """Yield a column for each value, on a pale ground line."""
    height = _DEVICE_HEIGHT - 34
    column = width / len(values)
    gap = 1 if column > 4 else 0
    yield Line(x, y + height, x + width, y + height, "grid")
    for index, value in enumerate(values):
        left, tall = x + index * column, height * value / most
        top = y + height - tall
        yield Rect(left, top, column - gap, tall, "pool-total", tip=sized(value))
