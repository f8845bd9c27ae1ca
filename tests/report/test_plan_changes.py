from dataclasses import replace

import pytest

from kvpipe.records.run import Fit, PlannedPhase, RunPlanned
from kvpipe.report.comparison import PlanChange
from kvpipe.report.comparison_report import plans_as_markdown
from kvpipe.report.side import plan_side

CONFIG = {"experiment": "mine", "engine": {"max_total_tokens": 64}, "pipeline": ["a", "b", "c"]}


def plan(peak=300, fits=True, names=("a", "b")):
    first, last = names
    phases = (PlannedPhase(first, {"kv": 400}, 400, 100), PlannedPhase(last, {}, 1200, peak))
    return RunPlanned("v4:2x2x1", 4, "0.0.2", phases, Fit(fits, 1000, last, 64))


def change(before, after, config=CONFIG):
    sides = (before and plan_side("b", before, CONFIG), after and plan_side("a", after, config))
    return PlanChange("mine", *sides)


def shown(*changes):
    return plans_as_markdown(changes, "main (1a2b3c4)", "the files here")


LEFT_OUT = "compiled code, temporaries and the runtime's own memory are left out"


def test_an_unchanged_experiment_is_named_and_no_more():
    assert shown(change(plan(), plan())) == (
        "# Plans compared\n\nBefore: main (1a2b3c4). After: the files here.\n\nUnchanged: `mine`.\n"
    )


def test_changed_keys_bytes_and_verdicts_are_shown_before_and_after():
    config = CONFIG | {"engine": {"max_total_tokens": 128, "page_size": 16}}
    assert shown(change(plan(), plan(peak=1500, fits=False), config)) == (
        "# Plans compared\n\n"
        "Before: main (1a2b3c4). After: the files here.\n\n"
        "## `mine`\n\n"
        "| config key | before | after |\n"
        "| --- | --- | --- |\n"
        "| `engine.max_total_tokens` | `64` | `128` |\n"
        "| `engine.page_size` | – | `16` |\n\n"
        "| bytes of | phase | before | after | after − before |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| fullest device | `b` | 300 | 1,500 | +1,200 |\n\n"
        "4 figures the same, or known of one side only.\n\n"
        "- Before: It fits: the peak is 300 of a device's 1,000 bytes after `b`; the largest "
        f"`engine.max_total_tokens` that fits is 64; {LEFT_OUT}.\n"
        "- After: It does not fit: the peak is 1,500 of a device's 1,000 bytes after `b`; the "
        f"largest `engine.max_total_tokens` that fits is 64; {LEFT_OUT}.\n"
    )


def test_phases_that_came_or_went_have_no_change_in_bytes():
    text = shown(change(plan(), plan(names=("a", "z"))))
    assert "| fullest device | `z` | – | 300 | – |" in text
    assert "| fullest device | `b` | 300 | – | – |" in text


def test_of_a_changed_list_only_what_came_and_went_is_shown():
    assert '| `pipeline` | `"b"` | `"x"`, `"y"` |' in shown(
        change(plan(), plan(), CONFIG | {"pipeline": ["a", "x", "c", "y"]})
    )


def test_a_list_in_another_order_is_shown_whole():
    assert '| `pipeline` | `["a", "b", "c"]` | `["c", "b", "a"]` |' in shown(
        change(plan(), plan(), CONFIG | {"pipeline": ["c", "b", "a"]})
    )


def test_a_value_with_marks_of_a_table_does_not_break_it():
    text = shown(change(plan(), plan(), CONFIG | {"experiment": "a|b`c"}))
    assert '| `experiment` | `"mine"` | `"a\\|b\'c"` |' in text


def test_a_new_experiment_has_its_verdict_and_one_that_is_gone_is_said_to_be():
    assert "It is new. It fits: the peak is 300" in shown(change(None, plan()))
    assert "It was removed." in shown(change(plan(), None))


@pytest.mark.parametrize(
    ("before", "after", "budget", "reported"),
    [
        (plan(), plan(), 0, None),
        (plan(), plan(peak=200), 0, None),
        (plan(), plan(peak=310), 10, None),
        (plan(), plan(peak=311), 10, "mine: the peak of a device grew by 11 bytes"),
        (plan(), plan(fits=False), 10, "mine: it does not fit"),
        (plan(fits=False), plan(fits=False), 0, None),
        (None, plan(), 0, None),
        (None, plan(fits=False), 0, "mine: it does not fit"),
        (plan(), None, 0, None),
    ],
)
def test_a_change_is_beyond_the_budget_if_a_peak_grows_more_or_no_longer_fits(
    before, after, budget, reported
):
    why = change(before, after).excess(budget)
    assert why is None if reported is None else why is not None and why.startswith(reported)


def test_only_a_change_of_the_plan_or_the_config_counts_as_one():
    same_but_later = replace(plan(), elapsed_s=3.0)
    assert "Unchanged" not in shown(change(plan(), same_but_later, CONFIG | {"experiment": "x"}))
