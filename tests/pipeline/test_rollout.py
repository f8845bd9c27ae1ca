"""Rollouts: their contents, their comparison, the phase's refusals and its requests to the engine."""

import hashlib
import json
import struct
from dataclasses import replace

import pytest

from kvpipe.config.schema import Kvpipe, RepeatConfig, SamplingConfig
from kvpipe.errors import PhaseError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.phase_files import phase_class
from kvpipe.pipeline.rollout import (
    Paused,
    Rollout,
    Sample,
    rollout_continued,
    rollout_proven,
    same_rollout,
    seed_of,
)
from kvpipe.pipeline.steps import build_steps
from tests.refusal import refusal

IDS = {"a": [(1, 2, 3), (1, 2)], "b": [(4, 5, 6), (4, 5, 7)]}


def sample(prompt="a", index=0, token_ids=(1, 2, 3), **changes):
    made = Sample(
        prompt=prompt,
        index=index,
        seed=7,
        text="text",
        token_ids=token_ids,
        logprobs=tuple(-0.5 for _ in token_ids),
        finish_reason="length" if len(token_ids) == 3 else "stop",
        prompt_tokens=10,
        cached_tokens=0,
        first_token_s=0.25,
    )
    return replace(made, **changes)


def rollout(*samples, **changes):
    given = samples or tuple(sample(p, i, ids) for p in IDS for i, ids in enumerate(IDS[p]))
    return replace(Rollout(given, 2.0, 3, "new", ()), **changes)


def with_sample(position, **changes):
    samples = list(rollout().samples)
    samples[position] = replace(samples[position], **changes)
    return rollout(*samples)


def test_a_seed_is_the_samples_own_and_does_not_depend_on_the_other_prompts():
    seeds = {
        seed_of(seed, prompt, index)
        for seed in range(10)
        for prompt in ("a", "b", "1", "11")
        for index in range(20)
    }
    assert len(seeds) == 800
    assert all(0 <= seed < 2**31 for seed in seeds)
    # Written down, so that the samples of a seed stay the same from version to version.
    assert (seed_of(0, "a", 0), seed_of(None, "a", 0)) == (1424302773, None)


def test_the_digest_is_of_all_ids_and_log_probabilities_with_the_ends_of_the_samples():
    whole = rollout(sample(token_ids=(1, 2), logprobs=(-0.5, -1.0)), sample(token_ids=(3,)))
    data = struct.pack("<3i2f2i1f", 2, 1, 2, -0.5, -1.0, 1, 3, -0.5)
    assert whole.digest == hashlib.sha256(data).hexdigest()


def test_equal_rollouts_pass_whatever_their_times_and_cached_tokens_were():
    later = replace(rollout(), duration_s=9.0, forward_steps=8)
    check = same_rollout("aa_control", rollout(), later)
    assert (check.name, check.passed, check.detail) == ("aa_control", True, "")
    assert check.expected == check.actual == rollout().digest


DIFFERENT = {
    "an id": (
        with_sample(3, token_ids=(4, 6, 7)),
        "sample 1 of prompt 'b': the first differing token is at index 1: 5 before, 6 now",
    ),
    "fewer tokens": (
        with_sample(2, token_ids=(4, 5), logprobs=(-0.5, -0.5)),
        "sample 0 of prompt 'b': the same 2 tokens, then it ends 1 token early",
    ),
    "the last bit of a log-probability": (
        with_sample(1, logprobs=(-0.5, -0.5000000596046448)),
        "sample 1 of prompt 'a': the log-probability at index 1 was -0.5, it is "
        "-0.5000000596046448",
    ),
    "no log-probability": (
        with_sample(1, logprobs=(float("nan"), -0.5)),
        "sample 1 of prompt 'a': the log-probability at index 0 was -0.5, it is nan",
    ),
    "two exchanged samples": (
        rollout(*(rollout().samples[i] for i in (1, 0, 2, 3))),
        "other samples: before sample 0 of prompt 'a', now sample 1 of prompt 'a'",
    ),
    "fewer samples": (rollout(sample()), "4 samples before, 1 sample now"),
    "another state of the prefix cache": (
        with_sample(3, token_ids=(4, 6, 7), cached_tokens=5),
        "sample 1 of prompt 'b': the first differing token is at index 1: 5 before, 6 now; the "
        "prefix cache had 0 tokens of the prompts before, 5 now: flush it before each of the two",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_first_request_that_differs_is_named_with_its_position(case):
    later, detail = DIFFERENT[case]
    check = same_rollout("same_rollout", rollout(), later)
    assert (check.passed, check.detail) == (False, detail)


@pytest.mark.parametrize(
    ("made", "failed"),
    [
        (rollout(), None),
        (with_sample(0, token_ids=(1, 2), logprobs=(-0.5, -0.5)), "rollout_complete"),
        (with_sample(0, token_ids=(), logprobs=(), finish_reason="stop"), "rollout_complete"),
        (with_sample(0, finish_reason="abort"), "rollout_complete"),
        (with_sample(0, logprobs=(-0.5, -0.5)), "rollout_complete"),
        (rollout(unlike=("sample 1 of prompt 'a'",)), "rollout_answered"),
        (rollout(forward_steps=2), "rollout_computed"),
        (rollout(cache_digests=("old",)), None),
        (replace(with_sample(1, cached_tokens=9), cache_digests=("new",)), None),
        (
            replace(with_sample(1, cached_tokens=9), cache_digests=("old",)),
            "cache_of_these_weights",
        ),
        # Samples of one prompt share it, in a cache that was empty before.
        (with_sample(1, cached_tokens=9), None),
    ],
)
def test_a_rollout_is_whole_computed_in_its_own_phase_and_of_these_weights_alone(made, failed):
    checks = list(rollout_proven(made, 3))
    names = ["rollout_complete", "rollout_answered", "rollout_computed", "cache_of_these_weights"]
    assert [check.name for check in checks] == names
    assert [check.name for check in checks if not check.passed] == ([failed] if failed else [])


def test_the_first_sample_that_is_too_short_is_named():
    short = with_sample(2, token_ids=(4,), logprobs=(-0.5,))
    check = next(rollout_proven(short, 3))
    assert (check.expected, check.actual) == (4, 3)
    assert check.detail == (
        "sample 0 of prompt 'b' has 1 token of 3, 1 with log-probability, and ended with 'length'"
    )


def test_the_first_sample_that_is_not_the_engines_answer_is_named():
    _, check, *_ = rollout_proven(rollout(unlike=("sample 1 of prompt 'a'", "another")), 3)
    assert (check.expected, check.actual) == (4, 2)
    assert check.detail == "sample 1 of prompt 'a' has other tokens than the engine's own answer"


def test_without_digests_nothing_is_said_about_the_weights_of_the_cache():
    names = [check.name for check in rollout_proven(rollout(weights_digest=None), 3)]
    assert names == ["rollout_complete", "rollout_answered", "rollout_computed"]


def test_equal_samples_of_two_prompts_are_distinct():
    same = replace(rollout(), samples=[replace(s, token_ids=(1,)) for s in rollout().samples])
    assert same.fields(shown=0)["distinct_samples"] == 2


def test_the_record_has_the_numbers_of_a_rollout_and_its_first_samples():
    fields = with_sample(1, cached_tokens=4).fields(shown=1)
    assert json.loads(json.dumps(fields))["lengths"] == fields["lengths"]
    (first,) = fields.pop("samples")
    assert (first["token_ids"], first["weights_digest"]) == ((1, 2, 3), "new")
    assert fields == {
        "requests": 4,
        "prompts": 2,
        "distinct_samples": 4,
        "prompt_tokens": 40,
        "decode_tokens": 11,
        "cached_tokens": 4,
        "cache_hit_rate": 0.1,
        "generating_s": 2.0,
        "tokens_per_second": 5.5,
        "first_token_s": {"median": 0.25, "most": 0.25},
        "finish_reasons": {"length": 3, "stop": 1},
        "lengths": {"2": 1, "3": 3},
        "mean_logprob": -0.5,
        "rollout_sha256": rollout().digest,
        "forward_steps": 3,
        "weights_digest": "new",
        "cache_digests": (),
    }


def test_a_rollout_without_a_single_token_has_a_record_and_fails_its_check():
    nothing = rollout(sample(token_ids=(), finish_reason="stop"))
    assert nothing.fields(shown=0)["mean_logprob"] == 0
    assert not next(rollout_proven(nothing, 3)).passed


def build(use, sampling=None, **options):
    config = Kvpipe(pipeline=["it"], phases={"it": {"use": use} | options})
    config.sampling = SamplingConfig(**sampling or {})
    (step,) = build_steps(config)
    return step


@pytest.mark.parametrize(
    ("use", "compared"), [("generate", "same_output_as"), ("rollout", "same_rollout_as")]
)
def test_a_draw_without_a_seed_is_refused_where_it_is_compared(use, compared):
    options = {"temperature": 0.7, compared: "first"}
    assert refusal(build, use, **options) == (
        "phases.it.seed is null and temperature is 0.7, so the token ids are drawn anew each time, "
        "but they must equal those of step 'first'; set sampling.seed"
    )
    assert build(use, {"seed": 0}, **options).draw_sampling().seed == 0
    assert build(use, temperature=0.7).draw_sampling().temperature == 0.7


@pytest.mark.parametrize("use", ["generate", "rollout"])
def test_a_seed_that_is_null_is_drawn_anew_and_a_greedy_step_has_none(use):
    warm = build(use, temperature=0.7)
    assert len({warm.draw_sampling().seed for _ in range(3)}) > 1
    assert build(use, seed=3).draw_sampling().seed is None


def test_the_options_of_a_step_are_those_of_sampling_unless_it_has_its_own():
    sampling = {"top_p": 0.5, "top_k": 3, "min_p": 0.1, "stop": ["a"], "stop_token_ids": [1]}
    step = build("rollout", sampling | {"n": 4, "temperature": 1.0, "seed": 5}, top_k=2)
    assert step.n == 4
    drawn = step.draw_sampling()
    expected = SamplingConfig(**sampling | {"n": 4, "temperature": 1.0, "seed": 5, "top_k": 2})
    assert drawn == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0, it must be more than 0 and at most 1"),
        ({"top_k": 0}, "top_k is 0, it must be at least 1"),
        ({"min_p": 1.5}, "min_p is 1.5, it must be from 0 to 1"),
        ({"seed": 2**31}, "seed is 2147483648, it must be from 0 to 2147483647"),
        ({"n": 0}, "n is 0, it must be at least 1"),
        (
            {"stop": ("a", "")},
            "stop has an empty text, which would end every sample at its first token",
        ),
        (
            {"stop_token_ids": (-1,)},
            "stop_token_ids: -1 is not a token id; an id is an integer of at least 0",
        ),
        ({"aa_control": True}, "aa_control is true, but same_rollout_as names no step to repeat"),
    ],
)
def test_a_wrong_option_is_refused_with_its_step(options, message):
    assert refusal(build, "rollout", **options) == f"phases.it.{message}"


def test_a_comparison_with_a_rollout_that_failed_names_its_step():
    with pytest.raises(PhaseError, match="step 'first', which failed, left no output to compare"):
        WorkerContext(Kvpipe(), "Hello").rollout_of("first")


def repeated(**options):
    """Return the two rollouts of the third cycle of two steps that are repeated."""
    phases = {"one": {"use": "rollout"}, "two": {"use": "rollout"} | options}
    config = Kvpipe(pipeline=["one", "two"], phases=phases)
    config.sampling = SamplingConfig(temperature=1.0, seed=5)
    config.repeat = RepeatConfig(first="one", last="two", times=3)
    return build_steps(config)[-2:]


def test_a_later_cycle_draws_other_samples_and_compares_within_itself():
    one, two = repeated(same_rollout_as="one")
    assert (one.step, one.seed) == ("one#3", 7)
    assert (two.step, two.seed, two.same_rollout_as) == ("two#3", 7, "one#3")


def test_the_rollout_of_a_step_is_what_another_may_be_compared_with():
    effect = phase_class("rollout")(step="it", same_rollout_as="first", **_sampling()).effect_given(
        frozenset()
    )
    assert "rollout:first" in effect.needs
    assert "rollout:it" in effect.adds
    assert effect.rolls_out


def _sampling():
    return phase_class("rollout").defaults(Kvpipe())


PAUSED = Paused(
    tokens=(2, 2, 1, 0),
    finished=1,
    half_way=2,
    forward_steps=2,
    weights_digest="old",
    cache_digests=("old",),
)


def resumed(**changes):
    given = {"paused": PAUSED, "continued": 2, "weights_digest": "old", "cache_digests": ("old",)}
    return replace(rollout(), **given | changes)


def failed(*checks):
    return [check.name for check in checks if not check.passed]


def test_the_tokens_of_a_resumed_sample_have_the_digest_of_the_weights_that_made_them():
    lines = resumed(weights_digest="new").lines()
    assert [line["digests"] for line in lines] == [
        [
            {"from": 0, "to": 2, "weights_digest": "old"},
            {"from": 2, "to": 3, "weights_digest": "new"},
        ],
        [{"from": 0, "to": 2, "weights_digest": "old"}],
        [
            {"from": 0, "to": 1, "weights_digest": "old"},
            {"from": 1, "to": 3, "weights_digest": "new"},
        ],
        [{"from": 0, "to": 3, "weights_digest": "new"}],
    ]
    assert [line["weights_digest"] for line in lines] == ["new", "old", "new", "new"]


@pytest.mark.parametrize("made", [rollout(weights_digest="old"), resumed()])
def test_all_tokens_of_a_sample_have_one_digest_if_the_weights_are_the_same(made):
    whole = [[{"from": 0, "to": n, "weights_digest": "old"}] for n in (3, 2, 3, 3)]
    assert [line["digests"] for line in made.lines()] == whole


def test_the_pieces_that_weights_made_follow_upon_the_tokens_of_the_others():
    made = resumed(weights_digest="new")
    old, new = ([(p.before, p.token_ids) for p in made.pieces(of)] for of in ("old", "new"))
    assert old == [((), (1, 2)), ((), (1, 2)), ((), (4,)), ((), ())]
    assert new == [((1, 2), (3,)), ((), ()), ((4,), (5, 6)), ((), (4, 5, 7))]
    assert [len(piece.logprobs) for piece in made.pieces("new")] == [1, 0, 2, 3]
    assert {piece.token_ids for piece in made.pieces("another")} == {()}


def test_a_rollout_that_is_to_be_computed_again_must_be():
    made = resumed(weights_digest="new", continued=0, recomputed=2)
    assert failed(*rollout_continued(made, True, recompute=True)) == []
    assert failed(*rollout_continued(made, True)) == ["requests_continued"]
    again = rollout_continued(resumed(weights_digest="new"), True, recompute=True)
    assert failed(*again) == ["requests_recomputed"]


@pytest.mark.parametrize(
    ("changes", "new_weights", "expected"),
    [
        ({}, False, []),
        ({"continued": 1}, False, ["requests_continued"]),
        ({"weights_digest": "new"}, True, []),
        ({"weights_digest": "new"}, False, ["continued_under_same_weights"]),
        ({}, True, ["continued_under_new_weights"]),
    ],
)
def test_a_rollout_goes_on_where_it_was_and_under_the_weights_that_were_meant(
    changes, new_weights, expected
):
    assert failed(*rollout_continued(resumed(**changes), new_weights)) == expected


def test_without_digests_a_resumed_rollout_proves_only_that_it_went_on():
    made = resumed(weights_digest=None, paused=replace(PAUSED, weights_digest=None))
    assert [check.name for check in rollout_continued(made, True)] == ["requests_continued"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The last sample has three tokens since the pause.
        ({"forward_steps": 3}, []),
        ({"forward_steps": 2}, ["rollout_computed"]),
        ({"weights_digest": "new", "cache_digests": ("old",)}, []),
        ({"cache_digests": ("old", "older")}, ["cache_of_these_weights"]),
    ],
)
def test_the_second_part_of_a_rollout_was_computed_since_its_pause(changes, expected):
    assert failed(*rollout_proven(resumed(**changes), 3)) == expected


def test_the_first_part_of_a_rollout_was_computed_before_its_pause():
    assert failed(*PAUSED.checks()) == []
    assert failed(*replace(PAUSED, forward_steps=1).checks()) == ["rollout_computed"]
    stale = replace(PAUSED, cache_digests=("older",))
    assert failed(*stale.checks()) == ["cache_of_these_weights"]


def test_the_record_of_a_pause_counts_where_the_requests_are():
    fields = PAUSED.fields
    assert {k: v for k, v in fields.items() if k.startswith("requests")} == {
        "requests": 4,
        "requests_finished": 1,
        "requests_half_way": 2,
        "requests_waiting": 1,
    }
    assert fields["decode_tokens"] == 5
    assert resumed().fields(shown=0)["paused"] == fields
