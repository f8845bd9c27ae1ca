"""Cost of the worker process: the tiny run with ``runner.isolate`` true and false, in turns.

CPU time, including children, is compared as well as wall time, because other processes disturb it
less.
"""

import statistics
import tempfile

from benchmarks.command import kvpipe

_TURNS = 3
_DEVICES = 2


def measure() -> dict[str, float]:
    """Return the seconds of both kinds of run, and the overhead of isolation as ratios."""
    wall: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as cwd:
        _run(cwd, isolate=False)  # generates the checkpoint, warms the page cache
        for turn in range(_TURNS):
            # Alternate which of a pair is first.
            for isolate in (True, False) if turn % 2 else (False, True):
                wall_s, cpu_s = _run(cwd, isolate)
                wall[isolate].append(wall_s)
                cpu[isolate].append(cpu_s)
    return {
        "supervision.isolated_seconds": statistics.median(wall[True]),
        "supervision.together_seconds": statistics.median(wall[False]),
        "supervision.isolated_cpu_seconds": statistics.median(cpu[True]),
        "supervision.together_cpu_seconds": statistics.median(cpu[False]),
        "supervision.seconds_added": _added(wall),
        "supervision.cpu_added": _added(cpu),
    }


def _added(measured: dict[bool, list[float]]) -> float:
    """Return the median over the pairs of the relative overhead of isolation."""
    pairs = zip(measured[True], measured[False], strict=True)
    return statistics.median(isolated / together - 1 for isolated, together in pairs)


def _run(cwd: str, isolate: bool) -> tuple[float, float]:
    """Run the tiny experiment; return its wall and CPU seconds."""
    ran = kvpipe(cwd, f"runner.isolate={str(isolate).lower()}", f"engine.tp_size={_DEVICES}")
    return ran.seconds, ran.cpu_seconds
