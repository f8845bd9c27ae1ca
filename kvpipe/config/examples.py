"""Read the examples that a trainer learns from; they become token ids only with a model's tokenizer."""

import hashlib
from dataclasses import dataclass

from kvpipe.config.json_lines import lines_of, object_of
from kvpipe.config.prompt import read_file
from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import InputError

_KEY, _GROUP = "trainer.data", "data"
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
    found = tuple(_example(where, line) for _, where, line in lines_of(_KEY, name, _GROUP))
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
    return hashlib.sha256(read_file(_KEY, _named(config), _GROUP).encode()).hexdigest()


def _named(config: TrainerConfig) -> str:
    if config.data is None:
        raise InputError(
            f"trainer.data: trainer.loss={config.loss} learns from a file; give one with a JSON "
            "object with 'prompt' and 'response' on each line"
        )
    return config.data


def _example(where: str, line: str) -> TextExample:
    data = object_of(where, line, _KEYS, "'prompt', 'response'")
    for key in _KEYS:
        value = data.get(key)
        if not isinstance(value, str) or not value:
            raise InputError(f"{where}: {key!r} is a text that is not empty, got {value!r}")
    return TextExample(data["prompt"], data["response"])
