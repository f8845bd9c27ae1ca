"""Inputs of a training, to compare a resumed run's config and files with those of the checkpoint."""

import hashlib
import json
from dataclasses import asdict
from enum import Enum
from typing import Any

from kvpipe.config import examples
from kvpipe.config.prompt import read_prompt
from kvpipe.config.prompts import read_prompts
from kvpipe.config.schema import Kvpipe


def as_plain(config: Kvpipe) -> dict[str, Any]:
    """Return the typed config as JSON values, with the edits of its pipeline made."""
    return json.loads(json.dumps(asdict(config), default=_value))


def digests(config: Kvpipe) -> dict[str, str | None]:
    """Return the SHA-256 of each file of the config, by its key; None if the key has no file.

    Raises:
        InputError: one cannot be read.
    """
    given = config.prompts.file or config.prompts.texts
    prompts = [asdict(prompt) for prompt in read_prompts(config.prompts)] if given else None
    return {
        "trainer.data": examples.digest(config.trainer),
        "prompt": _sha256(read_prompt(config.prompt)),
        "prompts": _sha256(json.dumps(prompts)) if prompts else None,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} is no value of a config")
