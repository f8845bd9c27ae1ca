"""The memory of this process, as the operating system counts it."""

import resource
import sys

import psutil

from kvpipe.records import Memory


def process_memory() -> Memory:
    """Return the resident set of this process and its peak in bytes, without the devices."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(psutil.Process().memory_info().rss, peak * unit)
