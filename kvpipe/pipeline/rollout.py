"""The samples of a rollout: what they are, their digest, and the comparison of two rollouts."""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpipe.pipeline.output import cache_of_these_weights, computed, difference
from kvpipe.records.run import Check, check_equal
from kvpipe.units import counted

LENGTH = "length"
"""The finish reason of a sample that has all tokens that were asked for."""


def seed_of(seed: int | None, prompt: str, index: int) -> int | None:
    """Return the seed of one sample, from 0 to 2^31 - 1, the engine's int32.

    It depends on the prompt's id, not on its place, so a sample stays the same among other prompts.

    Args:
        seed: the rollout's seed; None if it is greedy, and then its samples have none either.
        prompt: id of the prompt.
        index: number of the sample of this prompt, from 0.
    """
    if seed is None:
        return None
    text = f"{seed}/{index}/{prompt}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4]) >> 1


@dataclass(frozen=True)
class Request:
    """A request for one sample.

    Attributes:
        prompt: id of the prompt.
        index: number of the sample of this prompt, from 0.
        prompt_ids: token ids of the prompt.
        seed: seed of this sample; None if it is greedy.
    """

    prompt: str
    index: int
    prompt_ids: tuple[int, ...]
    seed: int | None


@dataclass(frozen=True)
class Sample:
    """A generated sample.

    Attributes:
        prompt: id of its prompt.
        index: number of the sample of this prompt, from 0.
        seed: seed of this sample; None if it is greedy.
        text: the new text, without the prompt and without the stop text.
        token_ids: ids of the new tokens, with the one that ended it.
        logprobs: natural logarithm of the probability of each of them, at temperature 1 and over the
            whole vocabulary, in float32.
        finish_reason: why it ended: ``stop`` (an end-of-sequence token, a stop text or id) or
            ``length``.
        prompt_tokens: length of the prompt in tokens.
        cached_tokens: number of those that were found in the prefix cache.
        first_token_s: seconds from the hand-over of all requests to its first token.
    """

    prompt: str
    index: int
    seed: int | None
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float

    @property
    def name(self) -> str:
        """The sample in messages."""
        return _name(self.prompt, self.index)


@dataclass(frozen=True)
class Piece:
    """The tokens of a sample that the same weights have made; none if they have made none of it.

    Attributes:
        prompt: id of its prompt.
        index: number of the sample of this prompt, from 0.
        before: ids of the sample's tokens before them.
        token_ids: their ids.
        logprobs: log-probability of each of them.
    """

    prompt: str
    index: int
    before: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def name(self) -> str:
        """The sample in messages."""
        return _name(self.prompt, self.index)


def _name(prompt: str, index: int) -> str:
    return f"sample {index} of prompt {prompt!r}"


@dataclass(frozen=True)
class Paused:
    """A rollout at its pause.

    Attributes:
        tokens: number of new tokens of each request.
        finished: number of requests that have ended.
        half_way: number of requests that have tokens and have not ended.
        forward_steps: steps that the engine ran until then, by its own count.
        weights_digest: digest of the weights that made these tokens; None without digests.
        cache_digests: those that the prefix cache was written under before.
    """

    tokens: tuple[int, ...]
    finished: int
    half_way: int
    forward_steps: int
    weights_digest: str | None
    cache_digests: tuple[str, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the phase's record."""
        return {
            "requests": len(self.tokens),
            "requests_finished": self.finished,
            "requests_half_way": self.half_way,
            "requests_waiting": len(self.tokens) - self.finished - self.half_way,
            "decode_tokens": sum(self.tokens),
            "forward_steps": self.forward_steps,
            "weights_digest": self.weights_digest,
            "cache_digests": self.cache_digests,
        }

    def checks(self) -> Iterator[Check]:
        """Yield the checks that the tokens were computed just now and of these weights alone."""
        yield computed("rollout_computed", self.forward_steps, max(self.tokens))
        if (digest := self.weights_digest) is not None:
            yield cache_of_these_weights([digest], sorted({digest, *self.cache_digests}))


@dataclass(frozen=True)
class Rollout:
    """The samples of a rollout, in the order of the requests.

    Attributes:
        samples: the samples.
        duration_s: seconds from the hand-over of all requests to the last answer.
        forward_steps: steps that the engine ran in that time, by its own count.
        weights_digest: digest of the weights that they were generated under; None without digests.
        cache_digests: those that the prefix cache was written under before.
        unlike: names of the samples whose tokens are not those of the engine's own answer.
        paused: its state at the pause, if it was paused; then duration, steps and digests are those
            after it.
        continued: number of requests unfinished at the pause whose tokens were not computed again.
        recomputed: number of those whose tokens were computed again.
    """

    samples: Sequence[Sample]
    duration_s: float
    forward_steps: int
    weights_digest: str | None
    cache_digests: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    paused: Paused | None = None
    continued: int = 0
    recomputed: int = 0

    @property
    def decode_tokens(self) -> int:
        """Number of new tokens."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompts, those of each sample counted."""
        return sum(sample.prompt_tokens for sample in self.samples)

    @property
    def cached_tokens(self) -> int:
        """Number of those that were found in the prefix cache."""
        return sum(sample.cached_tokens for sample in self.samples)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all token ids (int32) and their log-probabilities (float32)."""
        whole = hashlib.sha256()
        for sample in self.samples:
            count = len(sample.token_ids)
            whole.update(struct.pack(f"<i{count}i", count, *sample.token_ids))
            whole.update(struct.pack(f"<{len(sample.logprobs)}f", *sample.logprobs))
        return whole.hexdigest()

    def lines(self, most: int | None = None) -> list[dict[str, Any]]:
        """Return the lines of the rollout's file, one a sample; at most ``most``, from the first."""
        return [
            asdict(sample) | {"weights_digest": parts[-1]["weights_digest"], "digests": parts}
            for sample, parts in zip(self.samples[:most], self._parts(), strict=False)
        ]

    def pieces(self, digest: str | None) -> Iterator[Piece]:
        """Yield for each sample the tokens that the weights of a digest have made."""
        for sample, parts in zip(self.samples, self._parts(), strict=True):
            its = next((part for part in parts if part["weights_digest"] == digest), None)
            start, end = (its["from"], its["to"]) if its else (0, 0)
            ids, logprobs = sample.token_ids, sample.logprobs
            yield Piece(
                sample.prompt, sample.index, ids[:start], ids[start:end], logprobs[start:end]
            )

    def _parts(self) -> Iterator[list[dict[str, Any]]]:
        """Yield for each sample which of its tokens each weights digest made: from, and before to."""
        before = self.paused.tokens if self.paused else (0,) * len(self.samples)
        digest = self.paused.weights_digest if self.paused else self.weights_digest
        for sample, middle in zip(self.samples, before, strict=True):
            end = len(sample.token_ids)
            parts = [(0, middle, digest), (middle, end, self.weights_digest)]
            if digest == self.weights_digest:
                parts = [(0, end, digest)]
            kept = [part for part in parts if part[0] < part[1]] or parts[-1:]
            yield [dict(zip(("from", "to", "weights_digest"), part, strict=True)) for part in kept]

    def fields(self, shown: int) -> dict[str, Any]:
        """Return the fields of the phase's record.

        Args:
            shown: number of samples that the record has, from the first.
        """
        lengths = Counter(len(sample.token_ids) for sample in self.samples)
        firsts = sorted(sample.first_token_s for sample in self.samples)
        return {
            "requests": len(self.samples),
            "prompts": len({sample.prompt for sample in self.samples}),
            "distinct_samples": len({(sample.prompt, sample.token_ids) for sample in self.samples}),
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "cached_tokens": self.cached_tokens,
            "cache_hit_rate": round(self.cached_tokens / self.prompt_tokens, 6),
            "generating_s": round(self.duration_s, 6),
            "tokens_per_second": round(self.decode_tokens / self.duration_s, 3),
            "first_token_s": {
                "median": round(firsts[len(firsts) // 2], 6),
                "most": round(firsts[-1], 6),
            },
            "finish_reasons": dict(Counter(sample.finish_reason for sample in self.samples)),
            "lengths": {str(length): lengths[length] for length in sorted(lengths)},
            "mean_logprob": round(
                sum(sum(sample.logprobs) for sample in self.samples) / max(1, self.decode_tokens), 6
            ),
            "rollout_sha256": self.digest,
            "forward_steps": self.forward_steps,
            "weights_digest": self.weights_digest,
            "cache_digests": self.cache_digests,
            **({"paused": self.paused.fields} if self.paused else {}),
            "samples": self.lines(shown),
        }


def rollout_proven(rollout: Rollout, asked: int) -> Iterator[Check]:
    """Yield the checks that a rollout is whole, as answered, computed now, and of these weights.

    Args:
        rollout: the rollout.
        asked: number of tokens that were asked for.
    """
    samples = rollout.samples
    short = [sample for sample in samples if not _is_whole(sample, asked)]
    detail = ""
    if short:
        first = short[0]
        detail = (
            f"{first.name} has {counted(len(first.token_ids), 'token')} of {asked}, "
            f"{len(first.logprobs)} with log-probability, and ended with {first.finish_reason!r}"
        )
    whole = len(samples) - len(short)
    yield Check("rollout_complete", len(samples), whole, not short, detail)
    unlike = rollout.unlike
    detail = f"{unlike[0]} has other tokens than the engine's own answer" if unlike else ""
    yield check_equal("rollout_answered", len(samples), len(samples) - len(unlike), detail)
    paused = rollout.paused
    before = paused.tokens if paused else (0,) * len(samples)
    longest = max(len(s.token_ids) - n for s, n in zip(samples, before, strict=True))
    yield computed("rollout_computed", rollout.forward_steps, longest)
    if (digest := rollout.weights_digest) is not None:
        made = {digest, *([paused.weights_digest or ""] if paused else ())}
        # The samples of a prompt share it through the prefix cache, within the rollout too.
        used = {*made, *(rollout.cache_digests if paused or rollout.cached_tokens else ())}
        yield cache_of_these_weights(sorted(made), sorted(used))


def rollout_continued(
    rollout: Rollout, new_weights: bool, recompute: bool = False
) -> Iterator[Check]:
    """Yield the checks that a rollout continued where it paused, under the intended weights.

    Args:
        rollout: the rollout.
        new_weights: whether other weights were to make its further tokens.
        recompute: whether its tokens so far were to be computed again.
    """
    paused = rollout.paused
    assert paused is not None, "only a paused rollout is resumed"
    if recompute:
        detail = "requests unfinished at the pause whose KV entries were computed again"
        yield check_equal("requests_recomputed", paused.half_way, rollout.recomputed, detail)
    else:
        detail = "requests unfinished at the pause whose KV entries were read, not computed again"
        yield check_equal("requests_continued", paused.half_way, rollout.continued, detail)
    before, now = paused.weights_digest, rollout.weights_digest
    if before is None or now is None:
        return
    if new_weights:
        other = f"other weights than {before}"
        yield Check("continued_under_new_weights", other, now, before != now)
    else:
        yield check_equal("continued_under_same_weights", before, now)


def _is_whole(sample: Sample, asked: int) -> bool:
    """Return whether a sample ended as it was asked to, with the log-probability of each token.

    The engine ends a request that outgrows the KV cache with fewer tokens, and says ``length``.
    """
    count = len(sample.token_ids)
    ended = sample.finish_reason == "stop" or (sample.finish_reason == LENGTH and count == asked)
    return ended and 0 < count == len(sample.logprobs)


def same_rollout(name: str, earlier: Rollout, later: Rollout) -> Check:
    """Return the check that two rollouts are equal bit for bit, request by request."""
    detail = next(_differences(earlier, later), "")
    return Check(name, earlier.digest, later.digest, not detail, detail)


def _differences(earlier: Rollout, later: Rollout) -> Iterator[str]:
    """Yield the differences: which samples there are, token ids, log-probabilities."""
    before, now = ([sample.name for sample in each.samples] for each in (earlier, later))
    if len(before) != len(now):
        yield f"{counted(len(before), 'sample')} before, {counted(len(now), 'sample')} now"
    for a, b in zip(before, now, strict=False):
        if a != b:
            yield f"other samples: before {a}, now {b}"
    cached = ""
    if earlier.cached_tokens != later.cached_tokens:
        cached = (
            f"; the prefix cache had {earlier.cached_tokens} tokens of the prompts before, "
            f"{later.cached_tokens} now: flush it before each of the two"
        )
    for before, now in zip(earlier.samples, later.samples, strict=True):
        if why := difference(before.token_ids, now.token_ids):
            yield f"{now.name}: {why}{cached}"
        for position, (a, b) in enumerate(zip(before.logprobs, now.logprobs, strict=False)):
            if a != b:
                yield (
                    f"{now.name}: the log-probability at index {position} was {a!r}, it is {b!r}"
                    f"{cached}"
                )
