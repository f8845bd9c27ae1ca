import hashlib
import os
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.config.prompt import read_prompt
from kvpipe.config.schema import PromptConfig
from tests.refusal import refusal as refusal_of

SOP_SHA256 = "a25011bf8712b7c88b7a65496b98056b95462ed9225228d72c9c1bc17a2362f0"


def read(**options):
    return read_prompt(PromptConfig(**options))


refusal = partial(refusal_of, read)


@given(st.text(min_size=1))
def test_a_text_is_the_prompt_unchanged(text):
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert read(text=text, sha256=digest) == text


def test_a_file_is_read_to_the_byte(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffzwölf\r\nKühe\n\n".encode())
    assert read(file=str(path)) == "\ufeffzwölf\r\nKühe\n\n"


def test_the_shipped_prompt_is_the_one_of_the_sop():
    prompt = read(file="pkg://conf/prompt/sop_code.txt", sha256=SOP_SHA256)
    assert hashlib.sha256(prompt.encode()).hexdigest() == SOP_SHA256


@pytest.mark.parametrize("given_ones", [{}, {"text": "Hello", "file": "prompt.txt"}])
def test_exactly_one_of_text_and_file_is_required(given_ones):
    assert refusal(**given_ones) == "prompt: give one of prompt.text and prompt.file, and not both"


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "nowhere.txt"
    assert refusal(file=str(path)) == f"prompt.file: cannot read {path}: No such file or directory"


def test_a_shipped_file_that_is_not_there_is_named():
    name = "pkg://conf/prompt/nowhere.txt"
    assert refusal(file=name) == f"prompt.file: cannot read {name}: No such file or directory"


def test_a_directory_is_no_prompt(tmp_path):
    assert refusal(file=str(tmp_path)) == f"prompt.file: cannot read {tmp_path}: Is a directory"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = refusal(file=str(tmp_path / "pipe"))
    assert message == f"prompt.file: {tmp_path / 'pipe'} is a pipe, it must be a regular file"


def test_a_file_that_is_not_utf_8_is_named_with_the_byte(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("zwölf".encode("latin-1"))
    assert refusal(file=str(path)) == f"prompt.file: {path} is not UTF-8, byte 2 is 0xf6"


def test_a_text_that_is_not_unicode_is_refused_and_does_not_crash():
    """A shell passes bytes that are no UTF-8 on as lone surrogates, which cannot be encoded."""
    assert refusal(text="ab\udcff") == "prompt.text: it is not Unicode at character 2"


def test_an_empty_text_is_refused():
    assert refusal(text="") == "prompt: prompt.text is empty"


def test_an_empty_file_is_refused_by_name(tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    assert refusal(file=str(path)) == f"prompt: {path} is empty"


def test_another_sha256_is_refused_with_both(tmp_path):
    digest = hashlib.sha256(b"Hello").hexdigest()
    assert refusal(text="Hello", sha256="0" * 64) == (
        f"prompt.sha256: the prompt (prompt.text, 5 bytes) has {digest}, "
        f"not the expected {'0' * 64}"
    )


def test_another_sha256_names_the_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Hello")
    assert f"the prompt ({path}, 5 bytes) has " in refusal(file=str(path), sha256="0" * 64)
