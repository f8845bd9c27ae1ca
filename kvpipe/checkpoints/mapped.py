"""Files mapped into memory, whose pages come and go.

Pages that were touched count as this process's memory for as long as they are mapped. A swap reads
each of them twice; without letting them go it would seem to take the whole checkpoint.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvpipe.errors import InputError


class MappedFile(mmap.mmap):
    """A file mapped read-only; it can be read without touching the map as well.

    Attributes:
        path: its path.
        descriptor: of the file that is mapped, whatever has that path by now.
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
    """Return the bytes of a file, which must not be empty, as they are mapped."""
    return np.frombuffer(MappedFile(path), np.uint8)


def let_go(array: NDArray[Any]) -> None:
    """Give the pages of ``array`` back to the file; they are read again when they are touched."""
    file = _mapped_file(array)
    if file is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = _offset(array, file)
    first = start - start % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def blocks(array: NDArray[Any], nbytes: int) -> Iterator[NDArray[Any]]:
    """Yield all values of a contiguous array in one-dimensional blocks, in the order of memory.

    Those of a mapped file are read into one buffer, which each block overwrites: to fetch pages
    into a map and let them go again takes longer than to copy them.

    Args:
        array: the array; transposed or not.
        nbytes: bytes of a block, the last one may have less.

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
    """Fill ``into`` from ``offset`` on."""
    done = 0
    while done < into.nbytes:
        count = os.preadv(file.descriptor, [into[done:]], offset + done)
        if not count:
            raise InputError(
                f"{file.path} ends at byte {offset + done}: it has become shorter since it was opened"
            )
        done += count


def _mapped_file(array: NDArray[Any]) -> MappedFile | None:
    base: Any = array
    while base is not None and not isinstance(base, MappedFile):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def _offset(array: NDArray[Any], file: MappedFile) -> int:
    """Return where in the file the first byte of ``array`` is."""
    return array.ctypes.data - np.frombuffer(file, np.uint8, 1).ctypes.data
