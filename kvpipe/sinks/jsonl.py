"""Records as JSON lines: in the file ``records.jsonl``, and on stdout for pipes and ``tee``."""

import errno
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, TextIO

from kvpipe.errors import OutputError, RecordError, TimedOut
from kvpipe.records.run import PhaseRecord, Record, RunFinished
from kvpipe.sinks import Handed, Sink, failed_by
from kvpipe.system.lock import is_at, place_of
from kvpipe.units import counted

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

    def hung(self) -> None:
        """Write to nowhere from now on: the end of this process would wait for the reader too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def _put(self, line: str) -> None:
        self._stream.write(line)
        self._stream.flush()


class JsonFile(JsonLines):
    """Write the lines to a file, each flushed to disk while the next phase starts.

    A line is in the file whole or not at all. Some disk space is reserved: if the disk fills up,
    the record that hit the limit and the ones after it still fit. If somebody removes, replaces or
    changes the file, that is an error, and the lines go on in another one.

    Args:
        path: the file.
        continues: keep the lines that it has, of the run before it was resumed; one that was cut off
            by a kill is removed.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, path: Path, continues: bool = False) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | (0 if continues else os.O_TRUNC)
        self._file = os.open(path, flags, 0o644)
        there = os.pread(self._file, os.fstat(self._file).st_size, 0)
        self._size = there.rfind(b"\n") + 1
        self._lines: list[bytes] = there[: self._size].splitlines(keepends=True)
        self._earlier = len(self._lines)
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)
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

    def hung(self) -> None:
        """Do nothing: each record is tried again."""

    def run_finishes(self, handed: Handed) -> None:
        """Count the lines; before the last record, check that the file has all of them.

        Raises:
            RecordError: there is not one line for each record.
        """
        if (lines := len(self._lines) - self._earlier) != handed.records:
            raise RecordError(f"{self._path} has {lines} of {counted(handed.records, 'record')}")

    def run_finished(self, record: RunFinished) -> None:
        """Write the last record, marked as failed if a line before it is no longer there.

        Raises:
            RecordError: it cannot be written, or the lines before it were lost.
        """
        lost = None if self._is_whole() else self._go_on_elsewhere()
        self.received(failed_by(record, lost) if lost else record)
        if lost:
            raise lost

    def _put(self, line: str) -> None:
        lost = None if self._is_in_place() else self._go_on_elsewhere()
        self._lines.append(line.encode())
        try:
            self._append(line.encode())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self._reserve is None:
                raise
            self._give_up_reserve()
            self._append(line.encode())
            raise
        if lost:
            raise lost

    def _is_in_place(self) -> bool:
        """Whether the file is at its path and has its size."""
        return is_at(self._file, self._path) and os.fstat(self._file).st_size == self._size

    def _is_whole(self) -> bool:
        """Whether the file is at its path and has every line."""
        return self._is_in_place() and os.pread(self._file, self._size, 0) == b"".join(self._lines)

    def _go_on_elsewhere(self) -> RecordError:
        """Follow the file to where it was moved, or save its lines; return the event in words."""
        was = self._path
        self._path = place_of(self._file)
        if self._path != was and self._is_whole():
            return RecordError(f"{was} was moved during the run; the records are in {self._path}")
        happened = f"{was} was removed, replaced or changed during the run"
        try:
            file, self._path = save_lines(was, self._lines)
        except OSError as error:
            return RecordError(f"{happened}; its lines cannot be saved: {error.strerror}")
        os.close(self._file)
        self._file, self._size = file, sum(map(len, self._lines))
        return RecordError(f"{happened}; the records are in {self._path}")

    def _append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except (OSError, TimedOut):
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(line)

    def _give_up_reserve(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None


def save_lines(path: Path, lines: Sequence[bytes]) -> tuple[int, Path]:
    """Write lines to a new file, because ``path`` is lost; return its descriptor and its path.

    It is in the same directory, else next to that, else in the one for temporary files.

    Raises:
        OSError: it can be written to none of them.
    """
    for folder in (path.parent, path.parent.parent):
        with suppress(OSError):
            return _saved(folder, path, lines)
    return _saved(Path(tempfile.gettempdir()), path, lines)


def _saved(folder: Path, path: Path, lines: Sequence[bytes]) -> tuple[int, Path]:
    prefix = f"{path.stem}-of-{path.absolute().parent.name}-"
    file, name = tempfile.mkstemp(path.suffix, prefix, folder)
    try:
        os.fchmod(file, 0o644)
        with os.fdopen(os.dup(file), "wb") as copy:
            copy.writelines(lines)
    except OSError:
        os.close(file)
        Path(name).unlink()
        raise
    return file, Path(name)


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
