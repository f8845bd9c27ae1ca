"""The rollouts of a run as tables: figures, lengths of the samples, and the first samples."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvpipe.records.run import PhaseRecord
from kvpipe.report.tables import Cell, Table, number

_MOST_RANGES = 10
_MOST_CHARS = 60
_DIGITS = 12


def rollouts_of(phases: Sequence[PhaseRecord]) -> list[PhaseRecord]:
    """Return the phases that rolled out."""
    return [phase for phase in phases if "rollout_sha256" in phase.fields]


def rollout_tables(phases: Sequence[PhaseRecord]) -> list[Table]:
    """Return the tables of these rollouts; none without one."""
    if not phases:
        return []
    return [_whole(phases), _lengths(phases), _samples(phases[0])]


def _whole(phases: Sequence[PhaseRecord]) -> Table:
    columns = (
        *("phase", "ended by", "SHA-256", "samples", "distinct", "prompt tokens", "from the cache"),
        *("new tokens", "tokens/s", "first token, median", "mean log-probability"),
    )
    return Table("Counts and speed", columns, [_row(p.phase, p.fields) for p in phases], texts=3)


def _row(step: str, fields: Mapping[str, Any]) -> list[Cell]:
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in fields["finish_reasons"].items())
    return [
        Cell(codes=[step]),
        Cell(reasons),
        Cell(codes=[fields["rollout_sha256"][:_DIGITS]]),
        number(fields["requests"], f"of {fields['prompts']:,} prompts"),
        number(fields["distinct_samples"]),
        number(fields["prompt_tokens"]),
        Cell(f"{fields['cache_hit_rate']:.1%}"),
        number(fields["decode_tokens"]),
        Cell(f"{fields['tokens_per_second']:,.1f}"),
        Cell(f"{fields['first_token_s']['median']:.3f} s"),
        Cell(f"{fields['mean_logprob']:.4f}"),
    ]


def _lengths(phases: Sequence[PhaseRecord]) -> Table:
    """Return the number of samples by their length, in at most ten ranges of equal width."""
    counted = [
        Counter({int(length): n for length, n in phase.fields["lengths"].items()})
        for phase in phases
    ]
    first, last = min(map(min, counted)), max(map(max, counted))
    width = -(-(last - first + 1) // _MOST_RANGES)
    ranges = [range(start, start + width) for start in range(first, last + 1, width)]
    rows = [
        [Cell(_named(r)), *(number(sum(found[n] for n in r) or None) for found in counted)]
        for r in ranges
    ]
    columns = ("new tokens", *(phase.phase for phase in phases))
    return Table("Samples by length", columns, rows)


def _named(lengths: range) -> str:
    return f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"


def weights_of(sample: Mapping[str, Any], digits: int | None = None) -> list[str]:
    """Return the digest of the weights that made a sample's tokens.

    If several made them, each has the range of its tokens before it, e.g. ``0:7``.

    Args:
        sample: the sample, as a record has it.
        digits: number of a digest's digits to keep; None is all of them.
    """
    digests = sample["digests"]
    texts = [(part["weights_digest"] or "unknown")[:digits] for part in digests]
    if len(texts) == 1:
        return texts
    return [f"{p['from']}:{p['to']} {text}" for p, text in zip(digests, texts, strict=True)]


def _samples(phase: PhaseRecord) -> Table:
    columns = ("prompt", "text", "ended by", "weights", "sample", "new tokens", "log-probability")
    rows = list(_sample_rows(phase.fields["samples"]))
    return Table(f"The first samples of {phase.phase}", columns, rows, texts=4)


def _sample_rows(samples: Sequence[Mapping[str, Any]]) -> Iterator[list[Cell]]:
    for sample in samples:
        text = sample["text"]
        shown = text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
        yield [
            Cell(codes=[sample["prompt"]]),
            Cell(codes=[shown] if shown else ()),
            Cell(sample["finish_reason"]),
            Cell(codes=weights_of(sample, _DIGITS)),
            number(sample["index"]),
            number(len(sample["token_ids"])),
            Cell(f"{sum(sample['logprobs']):.4f}"),
        ]
