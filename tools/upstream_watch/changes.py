"""What differs between the facts of two versions, as lines for people."""

from collections.abc import Iterator, Mapping
from typing import Any

UNCHANGED = "unchanged"
LEGEND = """\
differs  what it was in the supported version → what it is here
gone     not in this version; of a touched attribute: the adapter has no use for it here
absent   the adapter asks whether it is there, and it is not
layers.* stands for all layers"""


def lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections with what is new, gone, moved or different in each."""
    for section in dict.fromkeys([*before, *after]):
        changed = list(_section(before.get(section, {}), after.get(section, {})))
        yield f"{section}: {f'{len(changed)} changed' if changed else UNCHANGED}"
        yield from (f"  {line}" for line in changed)


def _section(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    moved = _moved(before, after)
    for (old, new), count in _prefixes(moved).items():
        yield f"moved    {old} → {new} ({count})"
    for name, was in before.items():
        now_name = moved.get(name, name)
        if now_name not in after:
            yield f"gone     {name}: {was}"
        elif after[now_name] != was:
            yield f"differs  {now_name}: {was} → {after[now_name]}"
    for name, now in after.items():
        if name not in before and name not in moved.values():
            yield f"new      {name}: {now}"


def _moved(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Return old name → new name where only the first part of a dotted name is another."""
    gone = [name for name in before if name not in after]
    new = {_tail(name): name for name in after if name not in before}
    return {name: new[_tail(name)] for name in gone if "." in name and _tail(name) in new}


def _tail(name: str) -> str:
    return name.partition(".")[2]


def _prefixes(moved: Mapping[str, str]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for old, new in moved.items():
        key = old.partition(".")[0] + ".*", new.partition(".")[0] + ".*"
        counts[key] = counts.get(key, 0) + 1
    return counts
