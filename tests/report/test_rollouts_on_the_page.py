"""The page's view of rollouts: counts and speed, lengths, and the first samples."""

from dataclasses import replace

from kvpipe.pipeline.rollout import Paused, Rollout, Sample
from kvpipe.report.page import report_page
from kvpipe.report.run import run_of
from tests.report.html_page import Page
from tests.sinks.pipeline_records import STEPS, pipeline, started


def sample(index, count, reason="length"):
    return Sample(
        prompt="sum",
        index=index,
        seed=index,
        text="x" * (50 * count),
        token_ids=tuple(range(index, index + count)),
        logprobs=(-0.5,) * count,
        finish_reason=reason,
        prompt_tokens=4,
        cached_tokens=1,
        first_token_s=0.25 * (index + 1),
    )


def page_of(lengths, shown=2, **changes):
    samples = [sample(i, n, "stop" if n < 40 else "length") for i, n in enumerate(lengths)]
    rollout = replace(Rollout(samples, 2.0, 41, "d" * 16, ()), **changes)
    records = [replace(pipeline()[5], fields=rollout.fields(shown)), *pipeline()[6:8]]
    return rollout, Page(report_page(run_of("r", [started(), *pipeline()[:5], *records])))


def test_a_rollout_has_its_counts_its_speed_its_lengths_and_its_first_samples():
    rollout, page = page_of([1, 40, 40])
    (row,) = page.table("Counts and speed")[1:]
    assert row == [
        STEPS[5],
        "stop 1, length 2",
        rollout.digest[:12],
        "3of 1 prompts",
        "3",
        "12",
        "25.0%",
        "81",
        "40.5",
        "0.500 s",
        "-0.5000",
    ]
    lengths = page.table("Samples by length")
    assert (lengths[1], lengths[-1]) == (["1 to 4", "1"], ["37 to 40", "2"])
    assert len(lengths) == 11
    assert page.table(f"The first samples of {STEPS[5]}")[1:] == [
        ["sum", "x" * 50, "stop", "d" * 12, "0", "1", "-0.5000"],
        ["sum", "x" * 60 + "…", "length", "d" * 12, "1", "40", "-20.0000"],
    ]


def test_a_sample_that_two_sets_of_weights_made_has_the_range_of_tokens_of_each():
    paused = Paused((1, 7), 1, 1, 8, "c" * 16, ())
    _, page = page_of([1, 40], paused=paused)
    rows = page.table(f"The first samples of {STEPS[5]}")[1:]
    assert [row[3] for row in rows] == ["c" * 12, f"0:7 {'c' * 12}, 7:40 {'d' * 12}"]


def test_a_run_without_a_rollout_has_no_section_of_them():
    page = Page(report_page(run_of("r", [started(), *pipeline()[:8]])))
    assert page.all("h2", text="Rollouts") == []
    assert page_of([7])[1].table("Samples by length")[1:] == [["7", "1"]]
