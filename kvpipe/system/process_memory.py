"""Memory of processes and of the host, as the operating system counts it."""

import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil

from kvpipe.records.run import Memory

_RSS = re.compile(r"^VmHWM:\s+(?P<peak>\d+) kB\nVmRSS:\s+(?P<rss>\d+) kB$", re.MULTILINE)
_MOST_STATUS_BYTES = 65536
_VMSTAT = Path("/proc/vmstat")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_OOM_KILL = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


_lock = threading.Lock()
_peak_rss_bytes = 0


def process_memory() -> Memory:
    """Return this process's RSS and peak RSS in bytes, without the devices.

    Linux counts pages on each CPU and stores an estimate as the peak, which may lie below an RSS that
    it has shown; so the peak is the largest of all readings.
    """
    global _peak_rss_bytes
    now = _memory(os.getpid(), resource.RUSAGE_SELF)
    with _lock:
        _peak_rss_bytes = max(_peak_rss_bytes, now.process_peak_rss_bytes)
        return replace(now, process_peak_rss_bytes=_peak_rss_bytes)


def child_memory(pid: int) -> Memory:
    """Return a child's RSS and peak RSS in bytes; the RSS of a child that has ended is 0.

    The peak of a child that has ended and was reaped is that of the largest child so far.
    """
    return _memory(pid, resource.RUSAGE_CHILDREN)


def _memory(pid: int, who: int) -> Memory:
    """Return the RSS and peak RSS of a process.

    Linux gives both in one reading. Its other sources contradict it: ``ru_maxrss`` lags behind, and
    the one of a child begins at its parent's RSS.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        if found := _RSS.search(_status(pid)):
            return Memory(int(found["rss"]) * 1024, int(found["peak"]) * 1024)
    rss = 0
    with suppress(psutil.NoSuchProcess):
        rss = psutil.Process(pid).memory_info().rss
    peak = resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(rss, max(rss, peak))


def _status(pid: int) -> str:
    """Return what Linux says of a process.

    Its own is kept open: each call that may wait gives the GIL away, in a worker to the engine.
    """
    if pid == os.getpid():
        return os.pread(_kept_open(pid), _MOST_STATUS_BYTES, 0).decode()
    return Path(f"/proc/{pid}/status").read_text()


@cache
def _kept_open(pid: int) -> int:
    return os.open(f"/proc/{pid}/status", os.O_RDONLY)


def oom_kills() -> int:
    """Return how many processes Linux has killed for lack of memory so far, as far as visible here.

    The kernel's counter covers all cgroups; a container may only see its own cgroup's counter.
    """
    files = (_VMSTAT, _CGROUPS / "memory.events", _CGROUPS / "memory" / "memory.oom_control")
    texts = [file.read_text() for file in files if file.is_file()]
    return max((int(found[1]) for text in texts if (found := _OOM_KILL.search(text))), default=0)


def host_memory_bytes() -> int:
    """Return the bytes of memory that this process can have: the host's, or its container's limit.

    Linux kills a process that takes more than any of the cgroups above it allows.
    """
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Yield the limits of this process's cgroup and of all above it, of version 1 and 2.

    A container sees its own cgroup as the root of the tree, whatever its path.
    """
    if not _OWN_CGROUPS.is_file():
        return
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for directory in (own, *own.parents):
            with suppress(OSError, ValueError):  # of no file, and of the text "max"
                yield int((directory / name).read_text())
            if directory == root:
                break
