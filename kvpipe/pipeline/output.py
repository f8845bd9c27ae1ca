"""A generated output, and the comparisons of two of them on token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe.records.run import Check
from kvpipe.units import counted


@dataclass(frozen=True)
class Output:
    """A generated text, without the prompt, and the ids of its tokens.

    Of the prompt's tokens ``cached_tokens`` were found in the prefix cache; ``raw`` is the engine's
    whole answer, JSON-serialisable.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    raw: Mapping[str, Any]


def not_empty(output: Output) -> Check:
    """Return the check that an output has a token."""
    count = len(output.token_ids)
    return Check("output_not_empty", "at least 1 token", count, count > 0)


def same_output(name: str, earlier: Output, later: Output) -> Check:
    """Return the check that two outputs have the same token ids, at least one."""
    a, b = earlier.token_ids, later.token_ids
    detail = difference(a, b) or "" if a else "the earlier output is empty"
    return Check(name, list(a), list(b), bool(a) and a == b, detail)


def difference(before: Sequence[int], now: Sequence[int]) -> str | None:
    """Return how the token ids of an output differ from those of another; None if they do not."""
    for i, (a, b) in enumerate(zip(before, now, strict=False)):
        if a != b:
            return f"the first differing token is at index {i}: {a} before, {b} now"
    if not (more := len(now) - len(before)):
        return None
    same = counted(min(len(before), len(now)), "token")
    rest = (
        f"has {counted(more, 'token')} more"
        if more > 0
        else f"ends {counted(-more, 'token')} early"
    )
    return f"the same {same}, then it {rest}"


def different_output(name: str, earlier: Output, later: Output, detail: str) -> Check:
    """Return the check that two outputs have different token ids."""
    a, b = earlier.token_ids, later.token_ids
    return Check(name, f"other token ids than {list(a)}", list(b), a != b, detail)


def sha256(text: str) -> str:
    """Return the hash of ``text`` as records have it."""
    return hashlib.sha256(text.encode()).hexdigest()
