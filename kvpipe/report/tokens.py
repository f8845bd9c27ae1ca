"""Diff two lists of token ids, and shorten the stretches that agree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_CONTEXT = 6
# Matching takes the product of the lengths; longer middles are shown as one replaced stretch.
_MOST_MATCHED = 1024


@dataclass(frozen=True)
class Stretch:
    """The ids of adjacent tokens of both outputs; all of them agree, or none does."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether the outputs agree here."""
        return self.before == self.after


@dataclass(frozen=True)
class Omitted:
    """A number of tokens that agree and are not shown."""

    count: int


def stretches(before: Sequence[int], after: Sequence[int]) -> list[Stretch]:
    """Return both outputs as stretches that agree and that do not, in order."""
    head = _common_prefix(before, after)
    tail = _common_prefix(before[head:][::-1], after[head:][::-1])
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    beginning, ending = tuple(before[:head]), tuple(before[len(before) - tail :])
    found = [Stretch(beginning, beginning), *_matched(old, new), Stretch(ending, ending)]
    return [stretch for stretch in found if stretch.before or stretch.after]


def shortened(before: Sequence[int], after: Sequence[int]) -> Iterator[Stretch | Omitted]:
    """Yield the stretches; of those that agree only the ends next to a difference."""
    found = stretches(before, after)
    for index, stretch in enumerate(found):
        ids = stretch.before
        lead = _CONTEXT if index > 0 else 0
        trail = _CONTEXT if index < len(found) - 1 else 0
        hidden = len(ids) - lead - trail
        if not stretch.same or hidden <= 1:
            yield stretch
            continue
        if lead:
            yield Stretch(ids[:lead], ids[:lead])
        yield Omitted(hidden)
        if trail:
            yield Stretch(ids[-trail:], ids[-trail:])


def _matched(old: Sequence[int], new: Sequence[int]) -> list[Stretch]:
    if len(old) > _MOST_MATCHED or len(new) > _MOST_MATCHED:
        return [Stretch(tuple(old), tuple(new))]
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [Stretch(tuple(old[a:b]), tuple(new[c:d])) for _tag, a, b, c, d in blocks]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
