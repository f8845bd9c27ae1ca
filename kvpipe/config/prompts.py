"""Read the prompts of rollouts; a chat becomes text only with a model's tokenizer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvpipe.config.json_lines import lines_of, object_of
from kvpipe.config.schema import PromptsConfig
from kvpipe.errors import InputError
from kvpipe.units import counted

_KEYS = ("id", "prompt", "messages", "answer")
_MESSAGE = {"role": str, "content": str}


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        id: its name, one of its own.
        text: the prompt itself; None for a chat.
        messages: the messages of a chat, each with ``role`` and ``content``.
        answer: the right answer, for rewards; None if it has none.
    """

    id: str
    text: str | None
    messages: Sequence[Mapping[str, str]] = ()
    answer: str | None = None


def read_prompts(config: PromptsConfig) -> tuple[Prompt, ...]:
    """Return the prompts, at least one.

    Raises:
        InputError: file and texts are both given or both missing, the file cannot be read or has no
            prompt, a line is no prompt, a prompt is empty, or two have the same id.
    """
    if (config.file is None) == (not config.texts):
        raise InputError("prompts: give one of prompts.file and prompts.texts, and not both")
    if config.file is None:
        found = [(f"prompts.texts[{i}]", text) for i, text in enumerate(config.texts)]
        prompts = [_prompt(where, str(i), text) for i, (where, text) in enumerate(found)]
    else:
        prompts = list(_of_file(config.file))
    if not prompts:
        raise InputError(f"prompts.file: {config.file} has no prompt")
    if config.limit is not None and config.limit > len(prompts):
        raise InputError(
            f"prompts.limit is {config.limit}, but there {_are(len(prompts), 'prompt')}"
        )
    prompts = prompts[: config.limit]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise InputError(f"prompts: two have the id {prompt.id!r}; give each its own")
        seen.add(prompt.id)
        _refuse_surrogates(prompt)
    return tuple(prompts)


def _refuse_surrogates(prompt: Prompt) -> None:
    """Refuse text that UTF-8 cannot encode: JSON may have half of a pair of surrogates."""
    try:
        json.dumps(asdict(prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        wrong = error.object[error.start]
        raise InputError(f"prompts: {prompt.id!r} is not Unicode, it has {wrong!r}") from None


def _are(count: int, noun: str) -> str:
    return f"{'is' if count == 1 else 'are'} {counted(count, noun)}"


def _of_file(name: str) -> Iterator[Prompt]:
    """Yield the prompts of a file; empty lines count as none."""
    for number, where, line in lines_of("prompts.file", name, "prompts"):
        read = _json_line if name.endswith(".jsonl") else _prompt
        yield read(where, str(number), line)


def _json_line(where: str, own_id: str, line: str) -> Prompt:
    data = object_of(where, line, _KEYS, "'prompt' or 'messages'")
    if ("prompt" in data) == ("messages" in data):
        raise InputError(f"{where}: give one of 'prompt' and 'messages', and not both")
    given, answer = str(data.get("id", own_id)), data.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: 'answer' should be a text, got {answer!r}")
    if "prompt" in data:
        return replace(_prompt(where, given, data["prompt"]), answer=answer)
    messages = data["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise InputError(
            f"{where}: 'messages' should be a list of objects with the texts 'role' and 'content'"
        )
    return Prompt(given, None, tuple(messages), answer)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), kind) for key, kind in _MESSAGE.items()
    )


def _prompt(where: str, own_id: str, text: Any) -> Prompt:
    if not isinstance(text, str) or not text:
        raise InputError(f"{where}: a prompt is a text that is not empty, got {text!r}")
    return Prompt(own_id, text)
