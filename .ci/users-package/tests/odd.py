"""Reward odd token ids."""

from kvpipe.config.prompts import Prompt
from kvpipe.pipeline.rollout import Sample


def share(prompt: Prompt, sample: Sample) -> float:
    """Return the share of odd token ids."""
    return sum(token % 2 for token in sample.token_ids) / max(1, len(sample.token_ids))
