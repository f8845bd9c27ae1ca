"""A model's tokenizer: whether its files can be read, and the tokens of prompts and examples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.json_object import read_object
from kvpipe.config.examples import TextExample
from kvpipe.config.prompts import Prompt
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


def prompt_ids(prompts: Sequence[Prompt], tokenizer: Any) -> list[tuple[int, ...]]:
    """Return the token ids of prompts, those of chats by the tokenizer's template.

    Args:
        prompts: the prompts.
        tokenizer: the tokenizer as transformers has it, which is how the engine has it.

    Raises:
        InputError: the tokenizer has no chat template, or the template fails.
    """
    refuse_chats(prompts, tokenizer)
    found = []
    for prompt in prompts:
        if prompt.text is not None:
            ids = tokenizer.encode(prompt.text)
        else:
            ids = _chat_ids(prompt, tokenizer)
        found.append(tuple(ids))
    return found


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


def refuse_chats(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Refuse a chat if the tokenizer has no chat template.

    Raises:
        InputError: naming the first chat.
    """
    chat = next((prompt for prompt in prompts if prompt.text is None), None)
    if chat is not None and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"prompts: {chat.id!r} has messages, but the model's tokenizer has no chat template; "
            "give 'prompt' instead"
        )


def _chat_ids(prompt: Prompt, tokenizer: Any) -> Sequence[int]:
    try:
        text = tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template raises what it likes
        raise InputError(
            f"prompts: the chat template refuses the messages of {prompt.id!r}: {error}"
        ) from None
    # The template writes the special tokens itself.
    return tokenizer.encode(text, add_special_tokens=False)


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


def count_tokens(texts: Sequence[str], directory: Path) -> int | None:
    """Return the number of tokens of the longest text; None without a tokenizer.json."""
    file = directory / _FAST
    return count_with(_load(file), texts) if file.is_file() else None


def count_with(tokenizer: Any, texts: Sequence[str]) -> int:
    """Return the number of tokens of the longest text."""
    return max(len(tokenizer.encode(text).ids) for text in texts)


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
        raise InputError(f"{file} is not a tokenizer: {error}") from None
