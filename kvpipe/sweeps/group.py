"""Relate a sweep's jobs in W&B: one common group, and each job's overrides as tags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAG_CHARS = 64  # W&B's limit


def grouped(plain: Mapping[str, Any], sweep_dir: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a job's config with its overrides as tags, and in the sweep's group if it has none.

    An override that is too long for a tag is left out, because the config has it anyway.
    """
    tracking = dict(plain["tracking"])
    tracking["group"] = tracking["group"] or Path(sweep_dir).name
    own = tracking["tags"]
    added = [text for text in overrides if len(text) <= _TAG_CHARS and text not in own]
    tracking["tags"] = [*own, *added]
    return {**plain, "tracking": tracking}
