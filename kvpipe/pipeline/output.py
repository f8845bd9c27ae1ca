"""A generated output, and the comparisons of two of them on token ids."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe.records.run import Check, check_equal
from kvpipe.units import counted


@dataclass(frozen=True)
class Output:
    """A generated text, without the prompt, and the ids of its tokens.

    Attributes:
        text: the new text, without the prompt.
        token_ids: ids of the new tokens.
        prompt_tokens: length of the prompt in tokens.
        cached_tokens: number of those that were found in the prefix cache.
        raw: the engine's whole answer, JSON-serialisable.
        forward_steps: steps that the engine ran meanwhile, by its own count.
        stopped: whether a token ended it, not its length.
        weights_digest: digest of the weights that it was generated under; None without digests.
        cache_digests: those that the prefix cache was written under before.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    raw: Mapping[str, Any]
    forward_steps: int
    stopped: bool
    weights_digest: str | None
    cache_digests: tuple[str, ...]


def not_empty(output: Output) -> Check:
    """Return the check that an output has a token."""
    count = len(output.token_ids)
    return Check("output_not_empty", "at least 1 token", count, count > 0)


def output_proven(output: Output, max_new_tokens: int) -> Iterator[Check]:
    """Yield the checks that an output is whole, computed just now, and of these weights alone.

    Args:
        output: the output.
        max_new_tokens: number of tokens that were asked for.
    """
    count = len(output.token_ids)
    whole = count == max_new_tokens or (output.stopped and count < max_new_tokens)
    short = "" if whole or output.stopped else f"no end-of-sequence token ended it after {count}"
    yield Check("output_complete", max_new_tokens, count, whole, short)
    yield computed("output_computed", output.forward_steps, count)
    if output.weights_digest is not None:
        current = [output.weights_digest]
        used = list(output.cache_digests) if output.cached_tokens else current
        yield cache_of_these_weights(current, used)


def computed(name: str, steps: int, least: int) -> Check:
    """Return the check that the engine ran at least the steps that the tokens take."""
    return Check(name, f"at least {counted(least, 'step')}", steps, steps >= least)


def cache_of_these_weights(current: Sequence[str], used: Sequence[str]) -> Check:
    """Return the check that the prefix cache's contents were computed with the current weights.

    Args:
        current: digest of the weights in the engine.
        used: digests of those that the used part of the cache was written under.
    """
    detail = "digests of the weights that computed the cached part of the prompt"
    return check_equal("cache_of_these_weights", current, used, detail)


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
