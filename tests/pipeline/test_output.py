"""Comparisons of generated outputs, and what the generate phase makes of them."""

from dataclasses import replace

import pytest

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import PhaseError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.output import (
    Output,
    difference,
    different_output,
    not_empty,
    output_proven,
    same_output,
)
from kvpipe.pipeline.steps import build_steps


def output(*token_ids, cached_tokens=0, steps=9, stopped=False, cached_under=("new",)):
    cache = tuple(cached_under)
    return Output("text", token_ids, 3, cached_tokens, {}, steps, stopped, "new", cache)


@pytest.mark.parametrize(
    ("earlier", "later", "passed", "detail"),
    [
        ((1, 2), (1, 2), True, ""),
        ((1, 2), (1, 3), False, "the first differing token is at index 1: 2 before, 3 now"),
        ((1, 2), (1,), False, "the same 1 token, then it ends 1 token early"),
        ((), (), False, "the earlier output is empty"),
    ],
)
def test_outputs_are_the_same_if_their_token_ids_are_and_there_are_some(
    earlier, later, passed, detail
):
    check = same_output("aa_control", output(*earlier), output(*later))
    assert (check.name, check.passed, check.detail) == ("aa_control", passed, detail)
    assert (check.expected, check.actual) == (list(earlier), list(later))


@pytest.mark.parametrize(
    ("before", "now", "how"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2, 3], [1, 9], "the first differing token is at index 1: 2 before, 9 now"),
        ([1, 2], [1, 2, 3, 4], "the same 2 tokens, then it has 2 tokens more"),
        ([1, 2, 3], [1, 2], "the same 2 tokens, then it ends 1 token early"),
        ([], [1], "the same 0 tokens, then it has 1 token more"),
    ],
)
def test_an_output_that_continues_or_ends_early_has_no_differing_token(before, now, how):
    assert difference(before, now) == how


def test_outputs_differ_if_their_token_ids_do():
    check = different_output("changed", output(1, 2), output(1, 3), "why")
    assert (check.name, check.passed, check.detail) == ("changed", True, "why")
    assert (check.expected, check.actual) == ("other token ids than [1, 2]", [1, 3])
    assert not different_output("changed", output(1, 2), output(1, 2), "why").passed


def test_an_output_without_a_token_fails():
    assert [not_empty(output()).passed, not_empty(output(1)).passed] == [False, True]


@pytest.mark.parametrize(
    ("made", "failed"),
    [
        (output(1, 2, 3), None),
        (output(1, 2, stopped=True), None),
        (output(1, 2), "output_complete"),
        (output(1, 2, 3, 4, stopped=True), "output_complete"),
        (output(1, 2, 3, steps=3), None),
        (output(1, 2, 3, steps=2), "output_computed"),
        (output(1, 2, 3, cached_tokens=2), None),
        (output(1, 2, 3, cached_tokens=2, cached_under=["old"]), "cache_of_these_weights"),
        (output(1, 2, 3, cached_tokens=2, cached_under=["new", "old"]), "cache_of_these_weights"),
        (output(1, 2, 3, cached_under=["old"]), None),
    ],
)
def test_a_text_is_whole_computed_in_its_own_phase_and_of_these_weights_alone(made, failed):
    checks = list(output_proven(made, 3))
    assert [check.name for check in checks if not check.passed] == ([failed] if failed else [])


def test_without_digests_nothing_is_said_about_the_weights_of_the_cache():
    unknown = replace(output(1, cached_tokens=2), weights_digest=None)
    assert [c.name for c in output_proven(unknown, 1)] == ["output_complete", "output_computed"]


def generate(**options):
    config = Kvpipe(pipeline=["it"], phases={"it": {"use": "generate"} | options})
    (step,) = build_steps(config)
    return step


COMPARISONS = ["same_output_as", "different_output_from", "same_cached_tokens_as"]


@pytest.mark.parametrize("option", COMPARISONS)
def test_a_comparison_with_a_step_that_failed_names_that_step(option):
    """``different_output_from`` was a bare KeyError."""
    ctx = WorkerContext(Kvpipe(), "Hello")
    with pytest.raises(PhaseError, match="step 'first', which failed, left no output to compare"):
        list(generate(**{option: "first"}).checks(ctx, output(1)))


def test_a_generate_makes_a_check_for_each_comparison_that_it_is_asked_for():
    ctx = WorkerContext(Kvpipe(), "Hello", outputs={"first": output(1, cached_tokens=2)})
    options = dict.fromkeys(COMPARISONS, "first")
    checks = list(generate(**options).checks(ctx, output(1, cached_tokens=5)))
    assert [(check.name, check.passed) for check in checks] == [
        ("output_not_empty", True),
        ("same_output", True),
        ("different_output", False),
        ("same_cached_tokens", False),
        ("output_complete", False),
        ("output_computed", True),
        ("cache_of_these_weights", True),
    ]
    (_, control, *_) = generate(same_output_as="first", aa_control=True).checks(ctx, output(1))
    assert (control.name, control.passed) == ("aa_control", True)
