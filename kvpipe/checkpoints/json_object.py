"""Read JSON objects of files that others wrote: one message for all their faults."""

import json
from importlib.resources.abc import Traversable
from typing import Any

from kvpipe.errors import InputError


def read_object(file: Traversable, where: str = "") -> dict[str, Any]:
    """Return the JSON object in a file, which messages call ``where`` or, without it, by its path.

    Raises:
        InputError: it cannot be read, or :func:`parse_object` refuses it.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(f"{where or file} cannot be read: {error.strerror}") from None
    return parse_object(text, where or str(file))


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Return the JSON object in ``text``.

    Raises:
        InputError: it is no JSON, another kind of value, or has a key twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{where} should be a JSON object, got a {type(parsed).__name__}")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it has these keys more than once: {', '.join(twice)}")
    return parsed
