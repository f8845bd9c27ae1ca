"""Diff two configs, key by key."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NOTHING = object()


@dataclass(frozen=True)
class KeyChange:
    """A dotted key, and its values before and after as JSON: none where there is no such key.

    Of two lists only the items that the other lacks are there, unless only their order differs.
    """

    key: str
    before: Sequence[str]
    after: Sequence[str]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its dotted key; a list is a leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[KeyChange]:
    """Return the keys whose values differ, in alphabetical order."""
    old, new = dict(flat(before)), dict(flat(after))
    pairs = {key: (old.get(key, _NOTHING), new.get(key, _NOTHING)) for key in {**old, **new}}
    return [
        KeyChange(key, *_texts(was, now)) for key, (was, now) in sorted(pairs.items()) if was != now
    ]


def value_text(value: Any) -> str:
    """Return a config's value as text."""
    return json.dumps(value, ensure_ascii=False)


def _texts(old: Any, new: Any) -> tuple[list[str], list[str]]:
    if isinstance(old, list) and isinstance(new, list):
        removed, added = [x for x in old if x not in new], [x for x in new if x not in old]
        if removed or added:
            return [value_text(item) for item in removed], [value_text(item) for item in added]
    old_text, new_text = ([] if value is _NOTHING else [value_text(value)] for value in (old, new))
    return old_text, new_text
