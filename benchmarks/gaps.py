"""Time between the phases of a warm run: measuring, the ledger, the record and its receivers."""

import statistics
import tempfile

from benchmarks.command import Ran, kvpipe

_EXPERIMENTS = ("tiny", "tiny_rl_cycle")


def measure() -> dict[str, float]:
    """Return, of each experiment, the share of the time between phases and milliseconds a step."""
    measured: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cwd:
        for experiment in _EXPERIMENTS:
            command = f"+experiment={experiment}"
            kvpipe(cwd, command)  # compiles
            measured |= {f"gaps.{experiment}_{k}": v for k, v in _figures(kvpipe(cwd, command))}
    return measured


def _figures(run: Ran) -> list[tuple[str, float]]:
    outside = [phase["outside_s"] for phase in run.phases if phase["outside_s"]]
    inside = sum(phase["duration_s"] for phase in run.phases)
    return [
        ("share", sum(outside) / (sum(outside) + inside)),
        ("median_ms_a_step", 1000 * statistics.median(outside)),
        ("mean_ms_a_step", 1000 * statistics.mean(outside)),
    ]
