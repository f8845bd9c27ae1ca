"""Other processes that a test acts on."""

import time
from pathlib import Path

import psutil

_POLL_S = 0.001


def suspend(process: psutil.Process) -> None:
    """Stop a process, and return once each of its threads has: one that still runs may answer."""
    process.suspend()
    while any(map(_runs, Path(f"/proc/{process.pid}/task").glob("*/stat"))):
        time.sleep(_POLL_S)


def _runs(stat: Path) -> bool:
    state, *_ = stat.read_text().rpartition(")")[2].split()
    return state != "T"
