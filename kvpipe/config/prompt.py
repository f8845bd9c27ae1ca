"""Read the configured prompt, check its SHA-256, and estimate its length in tokens."""

import hashlib
from pathlib import Path

from kvpipe.config.schema import Kvpipe, PromptConfig
from kvpipe.errors import InputError
from kvpipe.system.places import CONF
from kvpipe.units import counted

_BYTES_PER_TOKEN = 3


def read_prompt(config: PromptConfig) -> str:
    """Return the prompt.

    Raises:
        InputError: text and file are both given or both missing, the file is missing or not UTF-8,
            the prompt is empty, or its SHA-256 differs.
    """
    if (config.text is None) == (config.file is None):
        raise InputError("prompt: give one of prompt.text and prompt.file, and not both")
    if config.text is not None:
        data = _encode(config.text)
    else:
        data = read_file("prompt.file", config.file or "", "prompt")
    try:
        prompt = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompt.file: {config.file} is not UTF-8, byte {error.start} is {data[error.start]:#x}"
        ) from None
    if not prompt:
        raise InputError(f"prompt: {config.file or 'prompt.text'} is empty")
    digest = hashlib.sha256(data).hexdigest()
    if config.sha256 is not None and digest != config.sha256:
        raise InputError(
            f"prompt.sha256: the prompt ({config.file or 'prompt.text'}, "
            f"{counted(len(data), 'byte')}) has {digest}, not the expected {config.sha256}"
        )
    return prompt


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # invalid UTF-8 from a terminal arrives as lone surrogates
        raise InputError(f"prompt.text: it is not Unicode at character {error.start}") from None


def read_file(key: str, name: str, group: str) -> bytes:
    """Return the contents of a file, which may be one of ``pkg://conf/<group>/``.

    Raises:
        InputError: naming the key, if it cannot be read.
    """
    shipped = f"pkg://conf/{group}/"
    path = CONF / group / name.removeprefix(shipped) if name.startswith(shipped) else Path(name)
    if path.is_fifo():
        # Reading it would wait for a writer, and it is read more than once.
        raise InputError(f"{key}: {name} is a pipe, it must be a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{key}: cannot read {name}: {error.strerror}") from None


def tokens_of_prompt(config: Kvpipe) -> int:
    """Return the length of the prompt in tokens for a plan, or an estimate of it.

    A model that is only named has no tokenizer here. English text and code have three to four
    bytes per token, and the engine pads the length to a power of two.
    """
    if config.plan.prompt_tokens is not None:
        return config.plan.prompt_tokens
    return max(1, len(read_prompt(config.prompt).encode()) // _BYTES_PER_TOKEN)
