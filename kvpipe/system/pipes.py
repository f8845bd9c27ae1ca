"""JSON lines between parent and child, and the names of the files that both use."""

import json
import select
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

STACKS_FILE = "stacks.txt"
BEGIN, STOP = "begin", "stop"
"""Orders of the parent to its worker."""


def remove_tree(directory: Path) -> None:
    """Remove a directory that parent and child may be removing at the same time."""

    def unless_gone(function: Any, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    shutil.rmtree(directory, onexc=unless_gone)


def send(channel: IO[str], message: Mapping[str, Any]) -> None:
    """Write a message as one JSON line and flush it."""
    send_line(channel, json.dumps(message, allow_nan=False))


def send_line(channel: IO[str], line: str) -> None:
    """Write one line and flush it."""
    channel.write(f"{line}\n")
    channel.flush()


def is_readable(descriptor: int, seconds: float | None) -> bool:
    """Whether a descriptor has something to read, or its end, within the time; None is no limit."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
