"""A model's tokenizer: whether its files can be read, and the tokens of prompts and examples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.json_object import read_object
from kvpipe.config.examples import TextExample
from kvpipe.errors import InputError

_FAST, _VOCABULARY, _MERGES, _PIECES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def find_faults(directory: Path, vocab_size: int | None) -> Iterator[str]:
    """Yield everything that is wrong with the tokenizer of a model's directory.

    ``vocab_size`` is the number of rows of the model's embedding; None if unknown.
    """
    there = [name for name in (_FAST, _VOCABULARY, _PIECES) if (directory / name).is_file()]
    if there == [_VOCABULARY] and not (directory / _MERGES).is_file():
        there = []
    if not there:
        yield f"it has no tokenizer: no {_FAST}, no {_VOCABULARY} with {_MERGES}, no {_PIECES}"
        return
    try:
        largest = max(_ids(directory), default=-1)
    except InputError as error:
        yield str(error)
        return
    if vocab_size is not None and largest >= vocab_size:
        yield (
            f"its tokenizer has the token id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1} (vocab_size is {vocab_size})"
        )


def open_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a model's directory as transformers has it; it takes a second.

    Raises:
        InputError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the library raises no class of its own
        raise InputError(f"{directory} has no tokenizer that can be read: {error}") from None


def example_ids(
    examples: Sequence[TextExample], tokenizer: Any
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the token ids of prompts and responses; the end of the text ends each response.

    Args:
        examples: the examples.
        tokenizer: the tokenizer as transformers has it, which is how the engine has it.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        (
            tuple(tokenizer.encode(example.prompt)),
            (*tokenizer.encode(example.response, add_special_tokens=False), *end),
        )
        for example in examples
    ]


def count_tokens(prompt: str, directory: Path) -> int | None:
    """Return the number of tokens of a prompt; None without a tokenizer.json."""
    file = directory / _FAST
    return count_with(_load(file), prompt) if file.is_file() else None


def count_with(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens of a prompt."""
    return len(tokenizer.encode(prompt).ids)


def _ids(directory: Path) -> Iterator[int]:
    """Yield the token ids of the files that there are."""
    if (file := directory / _FAST).is_file():
        yield from _load(file).get_vocab(with_added_tokens=True).values()
    elif (file := directory / _VOCABULARY).is_file():
        for ids in read_object(file).values():
            if type(ids) is not int:
                raise InputError(f"{file} should map tokens to ids, got {ids!r}")
            yield ids
    if (file := directory / "tokenizer_config.json").is_file():
        added = read_object(file).get("added_tokens_decoder") or {}
        yield from (int(token) for token in added if str(token).isdecimal())


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no class of its own
        raise InputError(f"{file} is no tokenizer: {error}") from None
