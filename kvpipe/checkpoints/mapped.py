"""Memory-mapped files whose pages can be released again.

Touched pages count towards this process's RSS for as long as they are mapped. A swap reads each
page twice; without releasing them, its RSS would grow by the whole checkpoint.
"""

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvpipe.errors import InputError

_SETTLED_NS = 1_000_000_000


class MappedFile(mmap.mmap):
    """A read-only mapped file that can also be read without touching the map.

    ``descriptor`` is that of the mapped file, even if ``path`` now names another file.
    """

    path: Path
    descriptor: int

    def __new__(cls, path: Path) -> Self:
        """Map the whole of ``path``, which must not be empty."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = super().__new__(cls, descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
        mapped.path, mapped.descriptor = path, descriptor
        return mapped

    def __del__(self) -> None:
        os.close(self.descriptor)


def map_bytes(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file, which must not be empty, as a mapped array."""
    return np.frombuffer(MappedFile(path), np.uint8)


def let_go(array: NDArray[Any]) -> None:
    """Release the pages of ``array``; the next access reads them from the file again."""
    file = _mapped_file(array)
    if file is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = _offset(array, file)
    first = start - start % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def identity(array: NDArray[Any]) -> tuple[Any, ...] | None:
    """Return a key for the values of ``array``: the same only if the file is unchanged.

    None for an array that is not of a mapped file, or of one that was written a moment ago: two
    writes within a tick of the file system's clock leave the same time.
    """
    file = _mapped_file(array)
    if file is None:
        return None
    status = os.fstat(file.descriptor)
    if time.time_ns() - status.st_mtime_ns < _SETTLED_NS:
        return None
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return (*version, _offset(array, file), array.shape, array.strides, array.dtype)


def blocks(array: NDArray[Any], nbytes: int) -> Iterator[NDArray[Any]]:
    """Yield a contiguous array's values in one-dimensional blocks of ``nbytes``, in memory order.

    The array may be transposed, and the last block shorter. Blocks of a mapped file are read into
    one buffer, which each block overwrites: faulting pages into the map and releasing them takes
    longer than copying.

    Raises:
        InputError: the file has become shorter.
    """
    flat = array.ravel(order="K")
    file = _mapped_file(flat)
    step = max(1, nbytes // flat.itemsize)
    if file is None:
        yield from (flat[i : i + step] for i in range(0, flat.size, step))
        return
    start, buffer = _offset(flat, file), np.empty(step, flat.dtype)
    for i in range(0, flat.size, step):
        block = buffer[: flat.size - i]
        _read(file, block.view(np.uint8), start + i * flat.itemsize)
        yield block


def _read(file: MappedFile, into: NDArray[np.uint8], offset: int) -> None:
    """Fill ``into`` with the file's bytes from ``offset`` on."""
    done = 0
    while done < into.nbytes:
        count = os.preadv(file.descriptor, [into[done:]], offset + done)
        if not count:
            raise InputError(
                f"{file.path} ends at byte {offset + done}: it was truncated after it was opened"
            )
        done += count


def _mapped_file(array: NDArray[Any]) -> MappedFile | None:
    base: Any = array
    while base is not None and not isinstance(base, MappedFile):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def _offset(array: NDArray[Any], file: MappedFile) -> int:
    """Return the offset in the file of the first byte of ``array``."""
    return array.ctypes.data - np.frombuffer(file, np.uint8, 1).ctypes.data
