"""What a generate says of two outputs: the same only if every token id is."""

import pytest

from kvpipe.context import Output
from phases.generate import different_output, same_output


def output(*token_ids: int) -> Output:
    return Output("text", token_ids, 1, 0, {})


@pytest.mark.parametrize(
    ("earlier", "later", "detail"),
    [
        ((1, 2, 3), (1, 5, 3), "the first differing token is at index 1: 2 before, 5 now"),
        ((1, 2, 3), (1, 2), "the first 2 tokens agree, then one output ends"),
        ((1, 2), (1, 2, 3), "the first 2 tokens agree, then one output ends"),
        ((), (), "the earlier output is empty"),
    ],
)
def test_outputs_that_differ_in_one_token_or_in_length_or_are_empty_are_not_the_same(
    earlier, later, detail
):
    check = same_output(output(*earlier), output(*later))
    assert (check.passed, check.detail) == (False, detail)


def test_equal_outputs_are_the_same_and_not_different():
    one, again, other = output(1, 2), output(1, 2), output(1, 3)
    assert same_output(one, again).passed
    assert not different_output("before", one, again).passed
    assert different_output("before", one, other).passed
