"""Records as JSON lines: in the file ``records.jsonl``, and on stdout for pipes and ``tee``."""

import errno
import os
from pathlib import Path
from typing import Self, TextIO

from kvpipe.errors import OutputError, RecordError
from kvpipe.records.run import PhaseRecord, Record
from kvpipe.sinks import Sink

# Enough for the last record of a run with thousands of token ids in its checks.
_RESERVE_BYTES = 1 << 20


class JsonLines(Sink):
    """Write each record as one line at once, so that a killed run keeps every line written so far.

    The caller that opened the stream closes it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def name(self) -> str:
        """Name of the output, for messages."""
        return getattr(self._stream, "name", "the stream")

    def received(self, record: Record) -> None:
        """Write the record.

        Raises:
            RecordError: it cannot be written.
        """
        try:
            self._put(f"{record.line}\n")
        except (OSError, OutputError) as error:
            phase = record.phase if isinstance(record, PhaseRecord) else record.tag
            message = f"{self.name}: cannot write the record of {phase!r}: {error.strerror}"
            raise RecordError(message) from error

    def _put(self, line: str) -> None:
        self._stream.write(line)
        self._stream.flush()


class JsonFile(JsonLines):
    """Write the lines to a file, each flushed to disk before the next phase starts.

    A line is in the file whole or not at all. Some disk space is reserved: if the disk fills up,
    the record that hit the limit and the ones after it still fit.

    Args:
        path: the file; overwritten.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size = 0
        self._reserve: int | None = _reserve(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._give_up_reserve()
        os.close(self._file)

    @property
    def name(self) -> str:
        """Path of the file."""
        return str(self._path)

    def _put(self, line: str) -> None:
        try:
            self._append(line.encode())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self._reserve is None:
                raise
            self._give_up_reserve()
            self._append(line.encode())
            raise

    def _append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(line)

    def _give_up_reserve(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None


def _reserve(directory: Path) -> int:
    """Return the descriptor of an unnamed file; closing it frees its disk space."""
    path = directory / ".reserve"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    path.unlink()
    try:
        os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
