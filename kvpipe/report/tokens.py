"""Where two lists of token ids differ, and how to show it without showing all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_CONTEXT = 6
# Matching takes the product of the lengths; longer middles are shown as one replaced stretch.
_MOST_MATCHED = 1024


@dataclass(frozen=True)
class Stretch:
    """Tokens next to each other that are all the same in both outputs, or all not.

    Attributes:
        before: the ids of the one output.
        after: the ids of the other; the same as ``before`` where they agree.
        start: index of the first of them in the one output.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: int

    @property
    def same(self) -> bool:
        """Whether the outputs agree here."""
        return self.before == self.after


@dataclass(frozen=True)
class Omitted:
    """Tokens that agree and are not shown.

    Attributes:
        count: how many.
    """

    count: int


def first_difference(before: Sequence[int], after: Sequence[int]) -> int | None:
    """Return the index from which the outputs differ; None if they do not."""
    common = _common_prefix(before, after)
    return None if common == len(before) == len(after) else common


def stretches(before: Sequence[int], after: Sequence[int]) -> list[Stretch]:
    """Return both outputs as stretches that agree and that do not, in order."""
    head = _common_prefix(before, after)
    tail = _common_prefix(before[head:][::-1], after[head:][::-1])
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    found = [Stretch(tuple(before[:head]), tuple(before[:head]), 0)]
    found += _matched(old, new, head)
    ending = tuple(before[len(before) - tail :])
    found.append(Stretch(ending, ending, len(before) - tail))
    return [stretch for stretch in found if stretch.before or stretch.after]


def shortened(found: Sequence[Stretch]) -> Iterator[Stretch | Omitted]:
    """Yield the stretches, of those that agree only the ends next to a difference."""
    for index, stretch in enumerate(found):
        if not stretch.same:
            yield stretch
            continue
        lead = _CONTEXT if index > 0 else 0
        trail = _CONTEXT if index < len(found) - 1 else 0
        hidden = len(stretch.before) - lead - trail
        if hidden <= 1:
            yield stretch
            continue
        if lead:
            yield _piece(stretch, 0, lead)
        yield Omitted(hidden)
        if trail:
            yield _piece(stretch, len(stretch.before) - trail, len(stretch.before))


def _piece(stretch: Stretch, start: int, stop: int) -> Stretch:
    ids = stretch.before[start:stop]
    return Stretch(ids, ids, stretch.start + start)


def _matched(old: Sequence[int], new: Sequence[int], offset: int) -> list[Stretch]:
    if len(old) > _MOST_MATCHED or len(new) > _MOST_MATCHED:
        return [Stretch(tuple(old), tuple(new), offset)]
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [Stretch(tuple(old[a:b]), tuple(new[c:d]), offset + a) for _tag, a, b, c, d in blocks]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
