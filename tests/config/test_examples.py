"""The file that a trainer learns from: what is refused before anything is started."""

from pathlib import Path

import pytest

from kvpipe.config.examples import TextExample, digest, read_examples
from kvpipe.config.schema import TrainerConfig
from kvpipe.errors import InputError
from tests.in_process import Call
from tests.refusal import refusal

GOOD = '{"prompt": "1 + 1 = ", "response": "2"}'


def of(tmp_path: Path, text: str) -> TrainerConfig:
    file = tmp_path / "data.jsonl"
    file.write_text(text, encoding="utf-8")
    return TrainerConfig(loss="sft", data=str(file))


def test_each_line_that_is_not_empty_is_an_example(tmp_path: Path) -> None:
    other = '{"response": "one\u2028line", "prompt": "x"}'
    config = of(tmp_path, f"{GOOD}\n\n{other}\n")
    assert read_examples(config) == (
        TextExample("1 + 1 = ", "2"),
        TextExample("x", "one\u2028line"),
    )
    assert digest(config) != digest(of(tmp_path, GOOD))
    assert digest(TrainerConfig()) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no example"),
        (f"{GOOD}\n{{", "line 2: not JSON"),
        ("[1]", "line 1: it is '[1]', not an object"),
        ('{"prompt": "a"}', "line 1: 'response' is a text that is not empty, got None"),
        ('{"prompt": "", "response": "b"}', "line 1: 'prompt' is a text that is not empty"),
        (
            '{"prompt": "a", "response": 2}',
            "line 1: 'response' is a text that is not empty, got 2",
        ),
        ('{"prompt": "a", "respond": "b"}', "line 1: there is no key 'respond'; did you mean"),
    ],
)
def test_a_line_that_is_no_example_is_refused_with_its_number(
    tmp_path: Path, text: str, message: str
) -> None:
    assert message in refusal(read_examples, of(tmp_path, text))


def test_a_loss_that_learns_from_a_file_needs_one() -> None:
    with pytest.raises(InputError, match=r"trainer\.data: trainer.loss=sft learns from a file"):
        read_examples(TrainerConfig(loss="sft"))
    with pytest.raises(InputError, match=r"cannot read pkg://conf/data/no\.jsonl: No such file"):
        read_examples(TrainerConfig(loss="sft", data="pkg://conf/data/no.jsonl"))


def test_an_example_that_is_longer_than_a_row_is_refused_before_the_start(kvpipe: Call) -> None:
    """The longest sum has 13 tokens: those of "42 + 26 = ", "68" and the end of the text."""
    assert kvpipe("check", "+experiment=tiny_sft", "trainer.length=13").code == 0
    answer = kvpipe("check", "+experiment=tiny_sft", "trainer.length=12")
    assert answer.code == 2
    assert "has 13 tokens with the end of its response, but trainer.length is 12" in answer.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.loss=ppo", "trainer.loss is 'ppo'"),
        (
            "trainer.micro_batch_size=5",
            "micro_batch_size is 5, it must divide trainer.batch_size (32)",
        ),
        ("trainer.length=1", "trainer.length is 1, it must be at least 2"),
        ("trainer.clip_norm=0", "trainer.clip_norm is 0.0, it must be more than 0"),
        ("trainer.decay_steps=0", "trainer.decay_steps is 0"),
        ("phases.loss_fell.share=0", "phases.loss_fell.share is 0.0, it must be more than 0"),
        ("trainer.data=null", "trainer.data: trainer.loss=sft learns from a file"),
    ],
)
def test_training_that_cannot_be_is_refused(kvpipe: Call, override: str, message: str) -> None:
    answer = kvpipe(
        "check", "+experiment=tiny_sft", f"+{override}" if "phases" in override else override
    )
    assert (answer.code, message in answer.err) == (2, True), answer.err
