"""Read the examples that a trainer learns from; they become token ids only with a model's tokenizer."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvpipe.config.prompt import read_file
from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import InputError
from kvpipe.suggest import nearest

_GROUP = "data"
_KEYS = ("prompt", "response")


@dataclass(frozen=True)
class TextExample:
    """A prompt, and the response that the model learns to give."""

    prompt: str
    response: str


def read_examples(config: TrainerConfig) -> tuple[TextExample, ...]:
    """Return the examples, at least one.

    Raises:
        InputError: there is no file, it cannot be read or has no example, or a line is none.
    """
    name = _named(config)
    found = tuple(_examples(name, read_file("trainer.data", name, _GROUP)))
    if not found:
        raise InputError(f"trainer.data: {name} has no example")
    return found


def digest(config: TrainerConfig) -> str | None:
    """Return the SHA-256 of the file, in hexadecimal; None if nothing is learnt from one.

    Raises:
        InputError: as of :func:`read_examples`.
    """
    if not config.reads_data:
        return None
    return hashlib.sha256(read_file("trainer.data", _named(config), _GROUP).encode()).hexdigest()


def _named(config: TrainerConfig) -> str:
    if config.data is None:
        raise InputError(
            f"trainer.data: trainer.loss={config.loss} learns from a file; give one with a JSON "
            "object with 'prompt' and 'response' a line"
        )
    return config.data


def _examples(name: str, text: str) -> Iterator[TextExample]:
    # Not splitlines: it would split at U+2028 and the like, too.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _example(f"trainer.data: {name}, line {number}", line)


def _example(where: str, line: str) -> TextExample:
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: it is {line[:40]!r}, not an object with 'prompt', 'response'")
    for key in data:
        if key not in _KEYS:
            raise InputError(f"{where}: there is no key {key!r}; {nearest(key, _KEYS)}")
    for key in _KEYS:
        value = data.get(key)
        if not isinstance(value, str) or not value:
            raise InputError(f"{where}: {key!r} is a text that is not empty, this is {value!r}")
    return TextExample(data["prompt"], data["response"])
