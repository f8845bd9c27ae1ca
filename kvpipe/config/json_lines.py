"""Read files with an object or a text a line; each line has its place for messages."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from kvpipe.config.prompt import read_file
from kvpipe.errors import InputError
from kvpipe.suggest import nearest


def lines_of(key: str, name: str, group: str) -> Iterator[tuple[int, str, str]]:
    """Yield number, place and text of each line that is not empty.

    Args:
        key: the key that names the file.
        name: the file, which may be one of ``pkg://conf/<group>/``.
        group: that folder.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    # Not splitlines: it would split at U+2028 and the like, too.
    for number, line in enumerate(read_file(key, name, group).split("\n"), start=1):
        if line.strip():
            yield number, f"{key}: {name}, line {number}", line.removesuffix("\r")


def object_of(where: str, line: str, keys: Sequence[str], wanted: str) -> dict[str, Any]:
    """Return the JSON object of a line.

    Args:
        where: the place of the line.
        line: its text.
        keys: those that it may have.
        wanted: those that it needs, in words.

    Raises:
        InputError: it is no JSON, no object, or has another key.
    """
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: it is {line[:40]!r}, not an object with {wanted}")
    for key in data:
        if key not in keys:
            raise InputError(f"{where}: there is no key {key!r}; {nearest(key, keys)}")
    return data
