"""The page's view of training: a curve for each number that was recorded, and a table of the steps."""

from dataclasses import replace

import pytest

from kvpipe.report.curves import CurvesChart, curves_of, training_of
from kvpipe.report.drawing import Rect
from kvpipe.report.page import report_page
from kvpipe.report.run import run_of
from tests.report.html_page import Page
from tests.sinks.pipeline_records import pipeline, started

BASE = pipeline()[5]


def cycle(number, reward):
    """Return the records of a rollout's rewards and of the training step that learnt from them."""
    numbers = {"reward_mean": reward, "reward_spread": 0.1}
    step = {"train_step": number, "loss": 2.0 - reward, "gradient_norm": 40_000.4, **numbers}
    policy = {"policy_difference": {"most": 1e-5 * number}}
    fields = {"rewarded": numbers, "policy_checked": policy, "train_step": step}
    mark = f"#{number}" if number > 1 else ""
    return [replace(BASE, phase=f"{name}{mark}", fields=f) for name, f in fields.items()]


def phases(count):
    after = {"reward_mean": 0.875, "reward_spread": 0.1}
    trained = [record for number in range(1, count + 1) for record in cycle(number, 0.25 * number)]
    return [*trained, replace(BASE, phase="rewarded_trained", fields=after)]


def test_each_number_has_a_curve_with_the_rewards_of_the_last_rollout_too():
    curves = {curve.name: curve.points for curve in curves_of(phases(2))}
    assert list(curves) == [
        "mean reward",
        "spread of the rewards",
        "loss",
        "norm of the gradients",
        "engine against trainer, nats at most",
    ]
    assert curves["mean reward"] == [
        ("rewarded", 0.25),
        ("rewarded#2", 0.5),
        ("rewarded_trained", 0.875),
    ]
    assert curves["loss"] == [("train_step", 1.75), ("train_step#2", 1.5)]


def test_the_page_has_the_curves_and_a_row_for_each_step():
    page = Page(report_page(run_of("r", [started(), *pipeline()[:5], *phases(2)])))
    rows = page.table("Training steps")
    assert rows[0] == [
        *("phase", "mean reward", "spread of the rewards", "loss", "norm of the gradients")
    ]
    assert rows[1:] == [
        ["train_step", "0.25", "0.1", "1.75", "40,000"],
        ["train_step#2", "0.5", "0.1", "1.5", "40,000"],
    ]
    assert page.all("text", text="mean reward")


def test_a_curve_goes_from_its_least_value_at_the_bottom_to_its_largest_at_the_top():
    chart = CurvesChart("tiny", curves_of(phases(3)))
    tips = {s.tip: s for s in chart.drawn(1000).shapes if isinstance(s, Rect)}
    low, middle, high = (
        tips[f"rewarded{n}: {v}"] for n, v in (("", 0.25), ("#2", 0.5), ("#3", 0.75))
    )
    assert low.x < middle.x < high.x
    assert low.y > high.y
    assert middle.y == pytest.approx((low.y + high.y) / 2)


def test_curves_of_many_cycles_are_thinned_to_the_last_one():
    curves = {curve.name: curve.points for curve in curves_of(phases(1000))}
    assert 150 < len(curves["loss"]) <= 200
    assert curves["loss"][-1][0] == "train_step#1000"


def test_a_run_without_a_loss_has_no_section_of_training():
    seeded = replace(BASE, phase="train_step", fields={"train_step": 1, "gradient_norm": 1.0})
    page = Page(report_page(run_of("r", [started(), *pipeline()[:5], seeded])))
    assert training_of([seeded]) == curves_of([seeded]) == page.all("h2", text="Training") == []
