"""The report page: what it says, and that it needs nothing and nobody."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from kvpipe.records.run import Check, Fit, PlannedPhase, RunPlanned
from kvpipe.report.page import report_page
from kvpipe.report.run import run_of
from tests.report.html_page import Page
from tests.sinks.pipeline_records import (
    KV_BYTES,
    OUTPUT,
    STEPS,
    failed,
    generated,
    ledger,
    passed,
    phase,
    pipeline,
    sha256,
    started,
    with_peak,
)


def planned():
    phases = []
    for idx, step in enumerate(STEPS):
        pools = {pool: size for pool, size in ledger(idx).items() if pool != "other"}
        phases.append(PlannedPhase(step, pools, sum(pools.values()), sum(pools.values()) // 4))
    return RunPlanned("v4:2x2x1", 4, "0.0.2", tuple(phases), Fit(True, 32 << 30, STEPS[13], 9))


RECORDS = [started(), planned(), *pipeline(), passed()]
WITH_RECORDS = {
    "passed": RECORDS,
    "failed": [*RECORDS[:-1], failed()],
    "killed": RECORDS[:6],
    "killed before its first phase": RECORDS[:1],
    "without a first record": RECORDS[2:],
    "hundreds of phases": [
        *RECORDS[:2],
        *(phase(i % 16, f"{STEPS[i % 16]}#{i // 16 + 2}") for i in range(320)),
    ],
}


def test_the_peak_of_a_start_is_on_the_page_beside_what_was_sampled():
    plan = planned()
    phases = [replace(p, peak_device_bytes=5 << 30) for p in plan.phases if p.name == STEPS[2]]
    measured = with_peak(phase(2), 16 << 30)
    text = report_page(run_of("r", [started(), replace(plan, phases=phases), measured]))
    assert "to hold at most 5,368,709,120 bytes of a device while it ran; 4,294,967,296" in text


def page_of(records):
    return Page(report_page(run_of("r", records)))


@pytest.mark.parametrize("records", WITH_RECORDS.values(), ids=WITH_RECORDS.keys())
def test_a_page_is_whole_and_asks_nobody_for_anything(records):
    text = report_page(run_of("r", records))
    page = Page(text)
    assert not page.all("script") + page.all("link") + page.all("img") + page.all("iframe")
    # The name space of SVG is no address that a browser would ask.
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in text and "@import" not in text
    assert all(e["href"].startswith("#") for e in page.elements if "href" in e)
    (policy,) = (e for e in page.elements if e.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


@pytest.mark.parametrize("records", WITH_RECORDS.values(), ids=WITH_RECORDS.keys())
def test_a_screen_reader_finds_landmarks_headings_and_heads_of_tables(records):
    page = page_of(records)
    for tag in ("h1", "header", "main", "nav", "footer"):
        assert len(page.all(tag)) == 1, tag
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch(r"h[1-6]", e["tag"])]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(e["scope"] in ("col", "row") for e in page.all("th"))
    ids = {e["id"] for e in page.elements if "id" in e}
    for svg in page.all("svg"):
        assert set(svg["aria-labelledby"].split()) <= ids
    for link in page.all("a"):
        assert link["href"].removeprefix("#") in ids
    labels = [e["aria-label"] for e in page.all("div", role="region")]
    assert len(labels) == len(set(labels))


def test_the_verdict_comes_first():
    page = page_of(RECORDS)
    assert page.text_of("p", class_="said") == "Passed"
    assert "16 of 16 phases in 41.2 s, 1 of 1 check passed" in page.text_of("header")
    assert "held the planned bytes, exactly, after each of 15 phases" in page.text_of("header")


def test_a_failed_run_says_why_at_once():
    check = Check("same_output", [1, 2, 3], [1, 2, 4], False, "first differing token at index 2")
    records = [*RECORDS[:-3], replace(phase(14), checks=(check,)), failed()]
    page = page_of(records)
    assert page.text_of("p", class_="said") == "Failed, exit code 1"
    (reason,) = page.all(
        "li",
        text=(
            "same_output in generate_result_after_kv_rebuild: expected [1, 2, 3], "
            "it was [1, 2, 4] (first differing token at index 2)"
        ),
    )
    assert "same_output" in reason["text"]
    row = next(r for r in page.table("Checks") if r[0] == "same_output")
    assert row[1:5] == [STEPS[14], "✗ fails", "[1, 2, 3]", "[1, 2, 4]"]


def test_an_error_without_a_failed_check_is_shown():
    error = "the engine's process ended by SIGKILL in step 'jax_ready'"
    page = page_of([*RECORDS[:3], passed(status="failed", exit_code=3, error=error, checks=())])
    (shown,) = page.all("pre", text=error)
    assert shown["tag"] == "pre"
    assert page.text_of("p", class_="said") == "Failed, exit code 3"


def test_a_run_without_a_last_record_did_not_finish():
    page = page_of(WITH_RECORDS["killed"])
    assert page.text_of("p", class_="said") == "It did not finish"
    assert len(page.all("div", class_="verdict")) == 1
    assert "The records end after 'mllm_params_cpu_ready': 4 of 16 phases" in page.text_of("header")


@pytest.mark.parametrize(("phases", "charts"), [(0, 0), (1, 1), (2, 2)])
def test_a_run_that_ended_early_shows_only_what_there_is(phases, charts):
    page = page_of([started(), *pipeline()[:phases]])
    assert len(page.all("figure")) - len(page.all("h3", text="Each device")) == charts
    assert bool(page.all("p", text="No phase has held bytes on a device.")) == (phases < 2)


def test_the_table_has_exact_bytes_and_what_was_planned():
    rows = page_of(RECORDS).table("Planned and actual bytes")
    heading = ["phase", "parameters", "KV cache", "slot param_dict2", "other arrays"]
    assert rows[0] == [*heading, "total", "planned total"]
    dropped = next(row for row in rows if row[0] == "kv_cache_dropped")
    assert dropped[1:5] == ["6,248,972,288as planned", "–", "–", "157,696not planned"]
    assert dropped[5:] == ["6,249,129,984", "6,248,972,288+157,696 measured"]


def test_a_pool_that_is_off_the_plan_says_by_how_much():
    grown = replace(phase(4), ledger={**ledger(4), "kv": KV_BYTES + 5}, plan_error_bytes={"kv": 5})
    page = page_of([*RECORDS[:6], grown])
    row = next(r for r in page.table("Planned and actual bytes") if r[0] == STEPS[4])
    assert row[2] == "9,663,750,1499,663,750,144 planned, +5"


def test_who_holds_the_arrays_in_no_pool_is_named_with_the_most_bytes():
    records = list(pipeline()[:6])
    records[3] = replace(records[3], other_bytes={"runner.rngs": 12})
    records[4] = replace(records[4], other_bytes={"runner.rngs": 12, "last batch": 4096})
    records[5] = replace(records[5], other_bytes={"runner.rngs": 12, "last batch": 1024})
    assert page_of([*RECORDS[:2], *records]).table("Arrays in no pool, by owner") == [
        ["owner", "first after", "last after", "most bytes"],
        ["runner.rngs", STEPS[3], STEPS[5], "12"],
        ["last batch", STEPS[4], STEPS[5], "4,096"],
    ]


def test_durations_and_compile_counts_are_in_a_table():
    rows = page_of(RECORDS).table("Durations and compilations")
    row = next(row for row in rows if row[0] == "generate_result")
    assert row[:3] == ["generate_result", "1.250", "2"]


def test_loaded_programs_and_the_time_between_phases_are_reported():
    later = replace(phase(5), programs_loaded=7, outside_s=0.25)
    page = page_of([*RECORDS[:6], later])
    row = next(r for r in page.table("Durations and compilations") if r[0] == STEPS[5])
    assert (row[3], row[5]) == ("7", "0.250 s")
    header = page.text_of("header")
    assert "and 7 loaded" in header
    share = 100 * 0.25 / (0.25 + 5 * 1.25)
    assert f"0.25 s{share:.1f} % of the time from the first step to the last" in header


def test_peaks_inside_phases_are_shown_if_there_are_any():
    none = [replace(record, peak=None) for record in pipeline()[:5]]
    page = page_of([*RECORDS[:2], *none, with_peak(phase(5), 20 << 30)])
    assert "Peak inside a phase" in page.text_of("header")
    rows = page.table("Durations and compilations")
    assert next(r for r in rows if r[0] == STEPS[5])[-1] == "≥ 20.00 GiB"
    assert "Peak inside a phase" not in page_of([*RECORDS[:2], *none]).text_of("header")


def test_texts_have_their_hashes_and_are_escaped():
    page = page_of(RECORDS)
    rows = page.table("Outputs")
    assert [row[0] for row in rows[1:]] == ["generate_result", STEPS[14]]
    assert [row[4] for row in rows[1:]] == ["the first", "the same token ids"]
    assert {row[5] for row in rows[1:]} == {sha256(OUTPUT)}
    assert page.all("pre", text=OUTPUT)
    assert "<script>1" not in report_page(run_of("r", RECORDS))


def test_another_output_is_shown_token_by_token():
    other = generated("another", token_ids=[1, 9, 3, 4])
    records = [*RECORDS[:-3], phase(14, fields=other), failed()]
    page = page_of(records)
    assert page.table("Outputs")[2][4] == "the first differing token is at index 1: 2 before, 9 now"
    assert [e["text"] for e in page.all("del")] == ["2"]
    assert [e["text"] for e in page.all("ins")] == ["9", "4"]


def test_outputs_of_other_prompts_are_not_held_against_each_other():
    other = generated("another", token_ids=[7], prompt="b", prompt_sha256=sha256("b"))
    page = page_of([*RECORDS[:-3], phase(14, fields=other), failed()])
    assert page.table("Outputs")[2][4] == "another prompt"
    assert page.all("del") == []


def test_the_config_and_the_versions_are_there():
    page = page_of(RECORDS)
    assert ["engine.max_total_tokens", "131072"] in page.table("Resolved config")
    assert ["kvpipe", "0.1.0"] in page.table("Versions")


def test_text_is_escaped_once_wherever_it_occurs():
    name = '<b title="&amp;">a_b'
    check = Check(name, name, name, False, name)
    page = page_of([*RECORDS[:2], replace(phase(0), phase=name, checks=(check,))])
    assert page.table("Checks")[1] == [name, name, "✗ fails", name, name, name]
    assert page.all("b") == []
    assert any(e["text"] == name for e in page.all("text"))
