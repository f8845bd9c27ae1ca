"""Memory of processes and of the host, as the operating system counts it."""

import re
import resource
import sys
from pathlib import Path

import psutil

from kvpipe.records.run import Memory

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_VMSTAT = Path("/proc/vmstat")
_CGROUPS = Path("/sys/fs/cgroup")
_OOM_KILL = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def process_memory() -> Memory:
    """Return this process's RSS and peak RSS in bytes, without the devices."""
    return Memory(psutil.Process().memory_info().rss, _peak(resource.RUSAGE_SELF))


def child_memory(pid: int) -> Memory:
    """Return a child's RSS and peak RSS in bytes; the RSS of a child that has ended is 0.

    The peak of a child that has ended and was reaped is that of the largest child so far.
    """
    try:
        rss = psutil.Process(pid).memory_info().rss
        found = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except (psutil.NoSuchProcess, FileNotFoundError):
        rss, found = 0, None
    return Memory(rss, int(found[1]) * 1024 if found else max(rss, _peak(resource.RUSAGE_CHILDREN)))


def _peak(who: int) -> int:
    """Return the peak RSS of this process, or of its largest child, in bytes."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def oom_kills() -> int:
    """Return how many processes Linux has killed for lack of memory so far, as far as visible here.

    The kernel's counter covers all cgroups; a container may only see its own cgroup's counter.
    """
    files = (
        _VMSTAT,
        _CGROUPS / "memory.events",
        _CGROUPS / "memory" / "memory.oom_control",
    )
    texts = [file.read_text() for file in files if file.is_file()]
    return max((int(found[1]) for text in texts if (found := _OOM_KILL.search(text))), default=0)
