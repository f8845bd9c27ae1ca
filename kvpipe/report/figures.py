"""The pictures of a run: memory on the devices, each device, and the host."""

from collections.abc import Mapping, Sequence

from kvpipe.cycles import cycle_of
from kvpipe.records import PhaseRecord
from kvpipe.report.chart import Bar, Chart, Part, Row
from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.report.legend import Key, pool_keys
from kvpipe.report.palette import pool_roles
from kvpipe.report.run import Run
from kvpipe.units import sized

# What the devices count beyond the arrays that are alive: compiled programs, the runtime's own.
BEYOND_ARRAYS = "in use beyond arrays"
_DEVICE_HEIGHT = 74


def memory_chart(run: Run) -> Chart:
    """Return the memory timeline: pools after each phase, measured above planned.

    Where rows are thin only phases that were not reached show what was planned.
    """
    roles = pool_roles([*run.pools, BEYOND_ARRAYS])
    done = {phase.phase for phase in run.phases}
    rows = [_phase_row(run, phase, roles) for phase in run.phases]
    rows += [
        Row(name, [_planned(run, name, roles)], "quiet", _group(name))
        for name in run.plan
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
    keys = pool_keys(pool_roles(run.pools))
    if any(total_of(phase) > sum(phase.ledger.values()) for phase in run.phases):
        keys.append(Key("pool-total", BEYOND_ARRAYS))
    if run.planned:
        said = "pale: planned, not reached" if memory_chart(run).dense else "thin and pale: planned"
        keys.append(Key("pool-total", said, "thin"))
    if any(phase.peak for phase in run.phases):
        keys.append(Key("peak", "whisker and (bytes): peak inside the phase", "whisker"))
    return keys


def host_chart(run: Run) -> Chart:
    """Return the resident memory of the host's process after each phase."""
    rows = []
    for phase in run.phases:
        memory = phase.memory
        part = Part("resident", "pool-host", memory.process_rss_bytes)
        peak = phase.peak.process_rss_bytes if phase.peak else None
        bar = Bar([part], "host", peak=peak)
        rows.append(Row(phase.phase, [bar], _role(phase), _group(phase.phase)))
    most = max((phase.memory.process_rss_bytes for phase in run.phases), default=0)
    return Chart(
        title=f"Host memory after each phase of {run.experiment}",
        description=f"Resident set of the process that ran each phase; the largest is "
        f"{sized(most)}.",
        rows=rows,
    )


def devices_drawing(run: Run, width: float) -> Drawing | None:
    """Return bytes in use of each device over the phases; None without devices."""
    series = _device_series(run.phases)
    if not series:
        return None
    most = max(max(values) for values in series) or 1
    columns = max(1, int(width // 230))
    cell = width / columns
    shapes: list[Shape] = []
    for device, values in enumerate(series):
        x, y = device % columns * cell, device // columns * _DEVICE_HEIGHT
        peak = f"device {device}: at most {sized(max(values))}"
        shapes.append(Text(x, y + 14, peak, "ink", size=12.5))
        shapes += _steps(values, most, x, y + 22, cell - 16, _DEVICE_HEIGHT - 34)
    height = ((len(series) + columns - 1) // columns) * _DEVICE_HEIGHT
    return Drawing(
        width,
        height,
        f"Bytes in use of each device of {run.experiment}",
        "; ".join(f"device {d}: at most {max(v):,} bytes" for d, v in enumerate(series)),
        shapes,
    )


def limit_bytes(run: Run) -> int | None:
    """Return what all devices have together; None if neither they nor the plan say."""
    for phase in run.phases:
        if limit := phase.memory.jax_device_memory_summary.get("bytes_limit_sum"):
            return limit
    return run.planned.fit.hbm_bytes * run.planned.devices if run.planned else None


def total_of(phase: PhaseRecord) -> int:
    """Return the bytes on all devices after the phase."""
    in_use = phase.memory.jax_device_memory_summary.get("bytes_in_use_sum", 0)
    return max(sum(phase.ledger.values()), in_use)


def _phase_row(run: Run, phase: PhaseRecord, roles: Mapping[str, str]) -> Row:
    parts = [Part(pool, roles[pool], size) for pool, size in _stacked(run, phase.ledger)]
    if (beyond := total_of(phase) - sum(phase.ledger.values())) > 0:
        parts.append(Part(BEYOND_ARRAYS, roles[BEYOND_ARRAYS], beyond))
    peak = phase.peak.bytes_in_use_total if phase.peak else None
    bars = [Bar(parts, "measured", peak=peak)]
    if phase.phase in run.plan:
        bars.append(_planned(run, phase.phase, roles))
    return Row(phase.phase, bars, _role(phase), _group(phase.phase))


def _planned(run: Run, name: str, roles: Mapping[str, str]) -> Bar:
    pools = run.plan[name].pools
    parts = [Part(pool, roles[pool], size) for pool, size in _stacked(run, pools)]
    return Bar(parts, "planned", thin=True)


def _stacked(run: Run, pools: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the pools in the order of the whole run, so that colours keep their places."""
    return [(pool, pools[pool]) for pool in run.pools if pools.get(pool)]


def _role(phase: PhaseRecord) -> str:
    return "ink" if phase.passed else "bad"


def _group(step: str) -> str:
    return f"cycle {cycle_of(step)}"


def _memory_description(run: Run) -> str:
    if not run.phases:
        return "No phase has finished."
    fullest = max(run.phases, key=total_of)
    last = run.phases[-1]
    return (
        f"A bar for each of {len(run.phases)} phases, stacked by pool. The most after a phase is "
        f"{sized(total_of(fullest))}, after {fullest.phase}; at the end, after {last.phase}, it is "
        f"{sized(total_of(last))}. The table of planned and actual bytes has every number."
    )


def _device_series(phases: Sequence[PhaseRecord]) -> list[list[int]]:
    """Return for each device its bytes in use after each phase that has devices."""
    measured = [
        [stats["bytes_in_use"] for stats in phase.memory.jax_device_memory_stats]
        for phase in phases
        if phase.memory.jax_device_memory_stats
        and all("bytes_in_use" in stats for stats in phase.memory.jax_device_memory_stats)
    ]
    return [list(values) for values in zip(*measured, strict=True)] if measured else []


def _steps(
    values: Sequence[int], most: int, x: float, y: float, width: float, height: float
) -> list[Shape]:
    """Return a column for each value, on a pale ground."""
    column = width / len(values)
    shapes: list[Shape] = [Line(x, y + height, x + width, y + height, "grid")]
    for index, value in enumerate(values):
        tall = height * value / most
        left, right = x + index * column, x + (index + 1) * column
        gap = 1 if column > 4 else 0
        shapes.append(
            Rect(left, y + height - tall, right - left - gap, tall, "pool-total", tip=sized(value))
        )
    return shapes
