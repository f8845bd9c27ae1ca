"""Read back the file that W&B's service has stored of a run, and find missing parts.

W&B's ``finish`` returns normally even if data was lost. What it took is in ``run-<id>.wandb``,
online too: a LevelDB log of protocol buffers, 7 bytes of W&B and then blocks of 32 KiB. A message
that does not fit into a block continues in the next one. Code that needs wandb must not be here.
"""

import json
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kvpipe.units import counted

_OWN_BYTES = 7
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")  # CRC, length, type
_FULL, _LAST = 1, 4
_PATH = "path"  # of a media file, under the key of the media


@dataclass
class Stored:
    """Contents of W&B's file of a run.

    Attributes:
        phases: phase of each row, in order.
        media: path of each media file by its key.
        files: paths of the files that it was asked to upload.
        ended: whether it has the exit code, which comes last.
    """

    phases: list[str] = field(default_factory=list)
    media: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    ended: bool = False


def read_stored(path: Path, parse: Callable[[bytes], Any]) -> Stored:
    """Return the contents of W&B's file so far.

    Args:
        path: the file.
        parse: converts a message to W&B's own record.
    """
    stored = Stored()
    with path.open("rb") as file:
        for message in _messages(file):
            record = parse(message)
            match record.WhichOneof("record_type"):
                case "history":
                    _add_row(stored, record.history.item)
                case "files":
                    stored.files |= {item.path for item in record.files.files}
                case "exit":
                    stored.ended = True
                case _:
                    pass
    return stored


def lacking(
    stored: Stored,
    folder: Path,
    phases: Sequence[str],
    media: Collection[str],
    files: Collection[str],
) -> str | None:
    """Return the parts of a run that W&B lacks, in words; None if it has all of it.

    Args:
        stored: what it has.
        folder: where it keeps files.
        phases: the phases that have a record.
        media: keys of the media that must be there.
        files: paths of the other files that must be there.
    """
    found: list[str] = []
    if lost := list((Counter(phases) - Counter(stored.phases)).elements()):
        found.append(
            f"{len(lost)} of {counted(len(phases), 'row')} are missing, first that of {lost[0]!r}"
        )
    if unknown := [key for key in media if key not in stored.media]:
        found.append(f"the media {', '.join(unknown)} are missing")
    paths = [*files, *(stored.media[key] for key in media if key in stored.media)]
    if gone := [p for p in paths if p not in stored.files or not (folder / p).is_file()]:
        found.append(f"of {counted(len(paths), 'file')} these are missing: {', '.join(gone)}")
    return "; ".join(found) or None


def _add_row(stored: Stored, items: Sequence[Any]) -> None:
    for item in items:
        key = item.key or "/".join(item.nested_key)
        if key == "phase/name":
            stored.phases.append(json.loads(item.value_json))
        elif key.endswith(f"/{_PATH}"):
            stored.media[key.removesuffix(f"/{_PATH}")] = json.loads(item.value_json)


def _messages(file: BinaryIO) -> Iterator[bytes]:
    """Yield the messages that are whole."""
    file.seek(_OWN_BYTES)
    parts = b""
    while True:
        if (left := _BLOCK - file.tell() % _BLOCK) < _HEADER.size:
            file.seek(left, 1)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        _, length, kind = _HEADER.unpack(header)
        part = file.read(length)
        if len(part) < length:
            return
        parts += part
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
