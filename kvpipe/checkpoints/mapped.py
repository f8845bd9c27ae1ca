"""Tell the system which pages of a mapped file are needed soon, and which are done with.

Pages that were read count as this process's memory for as long as they are mapped. A swap reads
each of them once; without letting them go it would seem to take the whole checkpoint.
"""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def will_need(array: NDArray[Any]) -> None:
    """Begin to read the file's part of ``array``; nothing for an array that no file backs."""
    _advise(array, "MADV_WILLNEED")


def let_go(array: NDArray[Any]) -> None:
    """Give the pages of ``array`` back to the file; they are read again when they are touched."""
    _advise(array, "MADV_DONTNEED")


def _advise(array: NDArray[Any], advice: str) -> None:
    file = _mapped_file(array)
    if file is None or not hasattr(mmap, advice):
        return
    start = array.ctypes.data - _address(file)
    first = start - start % mmap.PAGESIZE
    file.madvise(getattr(mmap, advice), first, start + array.nbytes - first)


def _mapped_file(array: NDArray[Any]) -> mmap.mmap | None:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base


def _address(file: mmap.mmap) -> int:
    return np.frombuffer(file, np.uint8, 1).ctypes.data
