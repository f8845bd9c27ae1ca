"""The prompts of rollouts: each form of a file, and each wrong one in one message."""

import json
from functools import partial

import pytest

from kvpipe.config.prompts import Prompt, read_prompts
from kvpipe.config.schema import PromptsConfig
from tests.refusal import refusal as refusal_of

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def read(**options):
    return read_prompts(PromptsConfig(**options))


refusal = partial(refusal_of, read)


def written(tmp_path, text, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return str(path)


def test_a_json_line_is_a_prompt_or_a_chat_with_its_own_id_or_the_number_of_its_line(tmp_path):
    lines = [{"prompt": "One"}, {"id": "two", "prompt": "Two\n"}, {"id": 3, "messages": HELLO}]
    file = written(tmp_path, "\n".join(map(json.dumps, lines)))
    assert read(file=file) == (
        Prompt("1", "One"),
        Prompt("two", "Two\n"),
        Prompt("3", None, tuple(HELLO)),
    )


def test_a_json_line_may_have_the_right_answer_as_a_text(tmp_path):
    lines = [{"prompt": "3 + 5 =", "answer": "8"}, {"messages": HELLO, "answer": "Hi"}]
    file = written(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [prompt.answer for prompt in read(file=file)] == ["8", "Hi"]
    file = written(tmp_path, '{"prompt": "3 + 5 =", "answer": 8}')
    assert refusal(file=file).endswith("line 1: 'answer' should be a text, got 8")


def test_every_line_of_another_file_is_a_prompt_and_an_empty_one_is_none(tmp_path):
    """U+2028 separates lines for ``str.splitlines``, but not in a file."""
    file = written(tmp_path, 'One\r\n\n  \n{"two": "\u2028"}\n', "prompts.txt")
    assert read(file=file) == (Prompt("1", "One"), Prompt("4", '{"two": "\u2028"}'))


def test_texts_are_prompts_that_are_called_by_their_places():
    assert read(texts=["One", "Two\n"]) == (Prompt("0", "One"), Prompt("1", "Two\n"))


def test_a_limit_takes_the_first_ones_and_nothing_is_wrong_with_the_rest():
    texts = ["One", "Two", "Three"]
    assert read(texts=texts, limit=2) == read(texts=texts)[:2]


def test_the_shipped_prompts_are_32_with_ids_of_their_own():
    prompts = read(file="pkg://conf/prompts/additions.jsonl")
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 32


@pytest.mark.parametrize("given_ones", [{}, {"texts": ["One"], "file": "prompts.txt"}])
def test_exactly_one_of_file_and_texts_is_required(given_ones):
    why = "prompts: give one of prompts.file and prompts.texts, and not both"
    assert refusal(**given_ones) == why


NOT_A_PROMPT = {
    '{"prompt": "One"': "not JSON: Expecting ',' delimiter: line 1 column 17 (char 16)",
    '["One"]': "it is '[\"One\"]', not an object with 'prompt' or 'messages'",
    '{"promt": "One"}': "there is no key 'promt'; did you mean 'prompt'?",
    '{"id": "one"}': "give one of 'prompt' and 'messages', and not both",
    '{"prompt": "One", "messages": []}': "give one of 'prompt' and 'messages', and not both",
    '{"prompt": ""}': "a prompt is a text that is not empty, got ''",
    '{"prompt": 1}': "a prompt is a text that is not empty, got 1",
    **dict.fromkeys(
        [
            '{"messages": []}',
            '{"messages": "Hello"}',
            '{"messages": [{"role": "user"}]}',
            '{"messages": [{"role": "user", "content": ["Hello"]}]}',
        ],
        "'messages' should be a list of objects with the texts 'role' and 'content'",
    ),
}


@pytest.mark.parametrize("line", NOT_A_PROMPT)
def test_a_line_that_is_no_prompt_is_named_with_its_number(tmp_path, line):
    file = written(tmp_path, f'{{"prompt": "Zero"}}\n\n{line}\n')
    assert refusal(file=file) == f"prompts.file: {file}, line 3: {NOT_A_PROMPT[line]}"


@pytest.mark.parametrize("text", ["", "\n \r\n"])
def test_a_file_without_a_prompt_is_refused_by_name(tmp_path, text):
    file = written(tmp_path, text)
    assert refusal(file=file) == f"prompts.file: {file} has no prompt"


def test_a_file_that_is_not_there_or_not_utf_8_is_named(tmp_path):
    gone = str(tmp_path / "gone.jsonl")
    assert refusal(file=gone) == f"prompts.file: cannot read {gone}: No such file or directory"
    (tmp_path / "latin1.txt").write_bytes("zwölf".encode("latin-1"))
    file = str(tmp_path / "latin1.txt")
    assert refusal(file=file) == f"prompts.file: {file} is not UTF-8, byte 2 is 0xf6"


def test_an_empty_text_is_refused_by_its_place():
    assert refusal(texts=["One", ""]) == (
        "prompts.texts[1]: a prompt is a text that is not empty, got ''"
    )


def test_two_prompts_with_one_id_are_refused_with_it(tmp_path):
    """A number is an id as its text is, so 2 is that of the second line."""
    file = written(tmp_path, '{"id": 2, "prompt": "One"}\n{"prompt": "Two"}\n')
    assert refusal(file=file) == "prompts: two have the id '2'; give each its own"


def test_a_limit_beyond_the_prompts_is_refused_with_their_number():
    why = "prompts.limit is 3, but there {}"
    assert refusal(texts=["One"], limit=3) == why.format("is 1 prompt")
    assert refusal(texts=["One", "Two"], limit=3) == why.format("are 2 prompts")


def test_text_that_is_not_unicode_is_refused_and_does_not_crash(tmp_path):
    file = written(tmp_path, '{"id": "one", "prompt": "ab\\ud800"}')
    assert refusal(file=file) == "prompts: 'one' is not Unicode, it has '\\ud800'"
    assert refusal(texts=["ab\udcff"]) == "prompts: '0' is not Unicode, it has '\\udcff'"
