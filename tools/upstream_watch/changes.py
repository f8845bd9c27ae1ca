"""Format the differences between the facts of two versions as lines for people."""

from collections import Counter
from collections.abc import Iterator, Mapping

UNCHANGED = "unchanged"
LEGEND = """\
differs  what it was in the supported version → what it is here; of a signature, the parameters
moved    the same names below another first one
gone     not in this version; of a touched attribute: the adapter has no use for it here
absent   the adapter asks whether it is there, and it is not
layers.* stands for all layers"""


Section = Mapping[str, str]


def lines(before: Mapping[str, Section], after: Mapping[str, Section]) -> Iterator[str]:
    """Yield each section with its new, gone, moved and changed facts."""
    prefixes: dict[str, str] = {}
    for section in dict.fromkeys([*before, *after]):
        was, now = before.get(section, {}), after.get(section, {})
        moved = _moved(was, now)
        prefixes |= {_head(old): _head(new) for old, new in moved.items()}
        # Rewrite a moved path in the mappings too, so that the move is reported only once.
        was = {name: _with_moved_paths(value, prefixes) for name, value in was.items()}
        changed = [*_moves(moved), *_differences(was, now, moved)]
        yield f"{section}: {f'{len(changed)} changed' if changed else UNCHANGED}"
        yield from (f"  {line}" for line in changed)


def _differences(before: Section, after: Section, moved: Mapping[str, str]) -> Iterator[str]:
    for name, was in before.items():
        now_name = moved.get(name, name)
        if now_name not in after:
            yield f"gone     {name}: {was}"
        elif after[now_name] != was:
            yield f"differs  {now_name}: {_difference(was, after[now_name])}"
    for name, now in after.items():
        if name not in before and name not in moved.values():
            yield f"new      {name}: {now}"


def _difference(was: str, now: str) -> str:
    """Return the difference: of two signatures the parameters, of anything else both values."""
    kind, _, old = was.partition("(")
    same_kind, _, new = now.partition("(")
    if kind != same_kind or kind not in ("class", "function"):
        return f"{was} → {now}"
    old_parts, new_parts = _parameters(old), _parameters(new)
    lost = [part for part in old_parts if part not in new_parts]
    won = [part for part in new_parts if part not in old_parts]
    differences = [f"without {', '.join(lost)}"] * bool(lost) + [f"with {', '.join(won)}"] * bool(
        won
    )
    return "; ".join(differences) or "its parameters in another order"


def _parameters(text: str) -> list[str]:
    """Return the parameters of ``a, b=(1, 2))``, split at the commas of the first level."""
    parts, depth = [""], 0
    for char in text.removesuffix(")"):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _moved(before: Section, after: Section) -> dict[str, str]:
    """Return old name → new name where only the first part of a dotted name differs."""
    gone = [name for name in before if name not in after]
    new = {_tail(name): name for name in after if name not in before}
    return {name: new[_tail(name)] for name in gone if "." in name and _tail(name) in new}


def _moves(moved: Mapping[str, str]) -> Iterator[str]:
    counts = Counter((_head(old), _head(new)) for old, new in moved.items())
    for (old, new), count in counts.items():
        yield f"moved    {old}.* → {new}.* ({count})"


def _with_moved_paths(value: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        value = value.replace(f"'{old}.", f"'{new}.")
    return value


def _head(name: str) -> str:
    return name.partition(".")[0]


def _tail(name: str) -> str:
    return name.partition(".")[2]
