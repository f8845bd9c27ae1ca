"""A generated output, and the comparisons of two of them on token ids."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpipe.records.run import Check


@dataclass(frozen=True)
class Output:
    """A generated text.

    Attributes:
        text: the new text, without the prompt.
        token_ids: ids of the new tokens.
        prompt_tokens: length of the prompt in tokens.
        cached_tokens: number of those that were found in the prefix cache.
        raw: the engine's whole answer, JSON-serialisable.
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
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    detail = ""
    if not a:
        detail = "the earlier output is empty"
    elif differ:
        i = differ[0]
        detail = f"the first differing token is at index {i}: {a[i]} before, {b[i]} now"
    elif len(a) != len(b):
        detail = f"the first {min(len(a), len(b))} tokens agree, then one output ends"
    return Check(name, list(a), list(b), bool(a) and a == b, detail)


def different_output(name: str, earlier: Output, later: Output, detail: str) -> Check:
    """Return the check that two outputs have different token ids."""
    a, b = earlier.token_ids, later.token_ids
    return Check(name, f"other token ids than {list(a)}", list(b), a != b, detail)


def sha256(text: str) -> str:
    """Return the hash of ``text`` as records have it."""
    return hashlib.sha256(text.encode()).hexdigest()
