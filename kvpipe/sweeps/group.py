"""What the jobs of a sweep have in common in W&B: a group, and their overrides as tags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAG_CHARS = 64  # W&B takes no longer tag


def grouped(plain: Mapping[str, Any], sweep_dir: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config of a job with the sweep's group, unless it has one, and its tags.

    Args:
        plain: the job's config.
        sweep_dir: directory of the sweep; its last part names the group.
        overrides: the job's overrides; one that is too long for a tag is left out, it stands in
            the config.
    """
    tracking = dict(plain["tracking"])
    tracking["group"] = tracking["group"] or Path(sweep_dir).name
    tags = [text for text in overrides if len(text) <= _TAG_CHARS]
    tracking["tags"] = list(dict.fromkeys([*tracking["tags"], *tags]))
    return {**plain, "tracking": tracking}
