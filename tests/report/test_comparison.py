"""Runs, plans and logs of the script held against each other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvpipe.config.schema import CompareConfig
from kvpipe.errors import InputError
from kvpipe.report.comparison import Comparison
from kvpipe.report.comparison_report import as_markdown, comparison_page
from kvpipe.report.plan import as_json
from kvpipe.report.side import PLAN, RUN, SCRIPT, Side, SidePhase, read_side
from tests.report.html_page import Page
from tests.report.test_page import planned
from tests.sinks.pipeline_records import (
    KV_BYTES,
    STEPS,
    failed,
    generated,
    ledger,
    passed,
    phase,
    pipeline,
    started,
    with_peak,
)

DATA = Path(__file__).parents[1] / "data"
SOP = DATA / "sop_run"
PLANNED = SOP / "qwen25_3b_bigkv.plan.json"
TINY = DATA / "tiny_runs"
STRICT = CompareConfig(duration_factor=1.5, compilations=0, allowance_bytes=0)


def side(folder, *records):
    folder.mkdir()
    lines = [record.line for record in records or (started(), *pipeline(), passed())]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return read_side(folder)


def with_phase(step, **more):
    idx = STEPS.index(step)
    records = pipeline()
    records[idx] = phase(idx, **more)
    return [started(), *records, passed()]


@pytest.fixture
def base(tmp_path):
    return side(tmp_path / "a")


def beyond(base, other, config=STRICT):
    return Comparison([base, other]).beyond(config)


def test_a_run_differs_in_nothing_from_itself(base):
    comparison = Comparison([base, base])
    assert comparison.beyond(STRICT) == []
    assert not [row for row in comparison.sizes if row.differs]
    assert "Nothing is beyond the thresholds." in as_markdown(comparison, STRICT)
    assert "No phase differs in its bytes." in as_markdown(comparison, STRICT)


@pytest.mark.parametrize(
    ("step", "more", "why"),
    [
        (
            "kv_cache_rebuilt",
            {"ledger": {**ledger(13), "kv": KV_BYTES + 7}},
            [
                "kv grew by 7 bytes after 'kv_cache_rebuilt', compare.budget_bytes is 0",
                "total grew by 7 bytes after 'kv_cache_rebuilt', compare.allowance_bytes is 0",
            ],
        ),
        (
            "flush_cache_before_kv_drop",
            {"ledger": {**ledger(9), "slot:left": 5}},
            [
                "slot:left grew by 5 bytes after 'flush_cache_before_kv_drop', "
                "compare.budget_bytes is 0",
                "total grew by 5 bytes after 'flush_cache_before_kv_drop', "
                "compare.allowance_bytes is 0",
            ],
        ),
        (
            "kv_cache_dropped",
            {"duration_s": 2.0},
            ["'kv_cache_dropped' took 1.60 times as long, compare.duration_factor is 1.5"],
        ),
        (
            "kv_cache_rebuilt",
            {"compilations": 1},
            ["'kv_cache_rebuilt' compiled 1 more, compare.compilations is 0"],
        ),
        (
            "generate_result",
            {"fields": generated("another", token_ids=[1, 2, 4])},
            [
                "the output of 'generate_result' is another: the first differing token is at "
                "index 2: 3 before, 4 now (compare.outputs)"
            ],
        ),
    ],
    ids=["kv", "slot", "slower", "compilation", "output"],
)
def test_what_is_beyond_a_threshold_is_reported_with_the_key(tmp_path, base, step, more, why):
    other = side(tmp_path / "b", *with_phase(step, **more))
    assert beyond(base, other) == [f"{other.name}: {text}" for text in why]
    back = [text.replace("3 before, 4 now", "4 before, 3 now") for text in why if "output" in text]
    assert beyond(other, base) == [f"{base.name}: {text}" for text in back]


def test_by_default_only_bytes_outputs_and_the_status_count(tmp_path, base):
    slower = side(tmp_path / "b", *with_phase("kv_cache_dropped", duration_s=90.0, compilations=9))
    grown = side(tmp_path / "c", *with_phase("jax_ready", ledger={"other": 1 << 20}))
    assert beyond(base, slower, CompareConfig()) == beyond(base, grown, CompareConfig()) == []
    worse = side(tmp_path / "d", started(), *pipeline(), failed())
    (why,) = beyond(base, worse, CompareConfig())
    assert why.endswith(f"its status is failed, that of {base.name} is passed")
    other = with_phase("generate_result", fields=generated("another", token_ids=[9]))
    changed = side(tmp_path / "e", *other)
    assert len(beyond(base, changed, CompareConfig())) == 1
    assert beyond(base, changed, CompareConfig(outputs=False)) == []


def test_growth_in_many_phases_is_reported_once_with_the_most(tmp_path, base):
    records = [
        replace(r, ledger={**r.ledger, "params": r.ledger["params"] + r.idx})
        if "params" in r.ledger
        else r
        for r in pipeline()
    ]
    other = side(tmp_path / "b", started(), *records, passed())
    (why,) = beyond(base, other, CompareConfig())
    assert why == (
        f"{other.name}: params grew by 15 bytes after 'after_drop_param_dict2' and in 13 more, "
        "compare.budget_bytes is 0"
    )


def test_each_further_run_is_held_against_the_first(tmp_path, base):
    grown = with_phase("kv_cache_rebuilt", ledger={**ledger(13), "kv": KV_BYTES + 7})
    others = [side(tmp_path / "b"), side(tmp_path / "c", *grown)]
    found = Comparison([base, *others]).beyond(CompareConfig())
    assert [why.partition(":")[0] for why in found] == [others[1].name]


def test_a_peak_inside_a_phase_counts_as_what_no_plan_holds_if_it_is_more_than_noise(
    tmp_path, base
):
    """Six runs of one phase had sampled peaks of 21.5 to 30.2 MB, which were listed as changes."""
    idx = STEPS.index("kv_cache_rebuilt")
    runs = []
    for peak in (21_500_000, 30_200_000, 32_300_000):
        records = pipeline()
        records[idx] = with_peak(phase(idx), peak)
        runs.append([started(), *records, passed()])
    one, noisy, other = (side(tmp_path / name, *r) for name, r in zip("bcd", runs, strict=True))
    assert beyond(one, noisy) == beyond(noisy, one) == []
    assert "No phase differs in its bytes." in as_markdown(Comparison([one, noisy]), STRICT)
    (why,) = beyond(one, other)
    text = as_markdown(Comparison([one, other]), STRICT)
    row = "| peak inside, sampled | `kv_cache_rebuilt` | ≥ 20.50 MiB | ≥ 30.80 MiB | +10,800,000 |"
    assert row in text
    assert why.endswith(
        "peak inside, sampled grew by 10,800,000 bytes after 'kv_cache_rebuilt', "
        "compare.allowance_bytes is 0"
    )


def test_runs_without_a_common_phase_are_refused(tmp_path, base):
    other = side(tmp_path / "b", phase(2, "mine"))
    with pytest.raises(InputError, match="have no phase in common"):
        Comparison.of([base, other])


def test_steps_of_one_side_keep_their_place_and_are_marked(tmp_path, base):
    records = pipeline()
    more = [*records[:3], phase(3, "mine"), *records[4:]]
    other = side(tmp_path / "b", started(), *more, passed())
    comparison = Comparison([base, other])
    assert comparison.phases == [*STEPS[:3], "mine", *STEPS[3:]]
    assert comparison.only_in(base) == [STEPS[3]]
    assert "but in B: `mine`." in as_markdown(comparison, STRICT)


def test_phases_with_the_same_figures_are_one_line():
    names = ["a", "b", "c", "d", "e"]
    kv = [*[(1, 2)] * 4, (1, 3)]
    sides = [
        Side(str(i), PLAN, {n: SidePhase({"kv": v[i]}) for n, v in zip(names, kv, strict=True)})
        for i in (0, 1)
    ]
    shown = as_markdown(Comparison(sides), STRICT)
    assert "| KV cache | `a`, `b`, `c` and 1 more | 1 | 2 | +1 |\n" in shown
    assert "| KV cache | `e` | 1 | 3 | +2 |\n" in shown


def test_the_markdown_of_two_tiny_runs_that_differ_in_their_kv_cache(monkeypatch):
    """The records are those of real runs; ``compared.md`` is what the command wrote of them."""
    monkeypatch.chdir(TINY)
    sides = [read_side(Path(name)) for name in ("1024.jsonl", "2048.jsonl")]
    shown = as_markdown(Comparison(sides), CompareConfig())
    assert shown == (TINY / "compared.md").read_text()
    tokens = 1024 * 3 * 2 * 2 * 128 * 2  # tokens, layers, K and V, heads, head_dim, bf16
    assert f"and 8 more | 3,148,800 | 6,294,528 | +{tokens:,} |" in shown


def test_the_json_has_every_figure_of_every_side(tmp_path, base):
    grown = with_phase("kv_cache_rebuilt", ledger={**ledger(13), "kv": KV_BYTES + 7})
    comparison = Comparison([base, side(tmp_path / "b", *grown)])
    found = json.loads(json.dumps(comparison.to_json(CompareConfig())))
    assert {
        "phase": "kv_cache_rebuilt",
        "name": "kv",
        "values": [KV_BYTES, KV_BYTES + 7],
    } in found["bytes"]
    assert [one["kind"] for one in found["sides"]] == [RUN, RUN]
    assert found["config"] == {comparison.sides[1].name: []}
    assert len(found["durations_s"]) == len(found["compilations"]) == 16
    assert [row["phase"] for row in found["outputs"]] == ["generate_result", STEPS[14]]
    assert len(found["beyond"]) == 1


def test_other_versions_and_keys_are_reported(tmp_path, base):
    first = replace(
        started({"engine": {"page_size": 64}}), versions={"kvpipe": "0.2.0", "jax": "0.8"}
    )
    comparison = Comparison([base, side(tmp_path / "b", first, *pipeline(), passed())])
    shown = as_markdown(comparison, STRICT)
    assert "| `engine.page_size` | – | `64` |" in shown
    assert '| `kvpipe` | `"0.1.0"` | `"0.2.0"` |' in shown
    assert "`jax`" not in shown


def test_a_phase_of_ones_own_that_only_one_run_has_is_reported(tmp_path, base):
    """It may take the place of one of kvpipe's, with every name in the records as before."""
    first = replace(
        started(), versions={"phase generate": "/mine/generate.py (sha256 0123456789ab)"}
    )
    comparison = Comparison([base, side(tmp_path / "b", first, *pipeline(), passed())])
    shown = as_markdown(comparison, STRICT)
    assert '| `phase generate` | – | `"/mine/generate.py (sha256 0123456789ab)"` |' in shown


@pytest.mark.parametrize("name", ["bigkv_131072", "kv32k", "param_swap_4096"])
def test_a_published_log_of_the_script_is_a_side(name):
    script = read_side(SOP / f"{name}.jsonl")
    assert script.kind == SCRIPT
    assert all(phase.pools is None for phase in script.phases.values())
    assert any(phase.total for phase in script.phases.values())


def test_of_a_log_only_the_lines_of_phases_are_read(tmp_path):
    lines = (SOP / "kv32k.jsonl").read_text().splitlines()
    noise = ["[2026-01-22] Fused KV size: 9.00 GB", '{"level": "info"}', "{broken", '{"phase": 1}']
    (tmp_path / "run.log").write_text("\n".join([*noise, *lines[:2], *noise, *lines[2:]]))
    read = read_side(tmp_path)
    assert read.phases == read_side(SOP / "kv32k.jsonl").phases
    assert read.name == str(tmp_path)


def test_the_plan_is_the_published_run_but_for_programs_and_small_buffers():
    """Planned on a machine without a TPU, measured on a v4-8."""
    plan, script = read_side(PLANNED), read_side(SOP / "bigkv_131072.jsonl")
    comparison = Comparison([plan, script])
    totals = {r.phase: r.values for r in comparison.sizes if r.name == "total" and r.comparable}
    assert len(totals) == 6
    before, after = totals["engine_ready_dummy"]
    assert after - before == 157_696
    assert all(abs(after - before) < 0.002 * after for before, after in totals.values())
    dropped, ready = totals["kv_cache_dropped"], totals["flush_cache_before_kv_drop"]
    assert ready[1] - dropped[1] == ready[0] - dropped[0] == KV_BYTES
    assert comparison.beyond(CompareConfig()) == []


def test_the_published_run_and_its_plan_are_side_by_side_on_a_page():
    sides = [read_side(PLANNED), read_side(SOP / "bigkv_131072.jsonl")]
    page = Page(comparison_page(Comparison(sides), CompareConfig()))
    assert page.text_of("p", class_="said") == "Within the thresholds"
    (wide,) = (e for e in page.all("svg") if e["class"] == "wide")
    assert "A 14.82 GiB" in wide["text"]
    assert "B 14.82 GiB" in wide["text"]
    rows = page.table("Bytes that differ")
    assert rows[0] == ["bytes of", "phase", "A", "B", "B − A"]
    assert rows[1][:4] == ["total", "engine_ready_dummy", "15,912,722,432", "15,912,880,128"]
    assert rows[1][4].startswith("+157,696")


def test_the_page_of_two_runs_has_their_outputs_times_and_configs(tmp_path, base):
    other = generated("another", token_ids=[1, 9, 3])
    records = with_phase("generate_result", fields=other)
    records[0] = started({"engine": {"max_total_tokens": 4}})
    comparison = Comparison([base, side(tmp_path / "b", *records)])
    page = Page(comparison_page(comparison, CompareConfig()))
    assert page.text_of("p", class_="said") == "Beyond the thresholds"
    assert [e["text"] for e in page.all("del") + page.all("ins")] == ["2", "9"]
    assert page.table("Durations and compilations")[1][:3] == ["wandb_init", "1.250", "1.250"]
    assert ["engine.max_total_tokens", "131072", "4"] in page.table("config key: A and B")


def test_a_plan_is_a_side_with_the_pools_that_it_plans(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(as_json(planned())))
    plan = read_side(path)
    assert (plan.kind, plan.status) == (PLAN, None)
    assert plan.phases["kv_cache_dropped"].held("kv") == 0
    assert plan.phases["kv_cache_dropped"].held("other") is None
    run = side(tmp_path / "a")
    differing = [row.name for row in Comparison([plan, run]).sizes if row.differs]
    assert set(differing) == {"total"}


def test_of_a_side_without_pools_none_is_known():
    assert SidePhase(total=5).held("kv") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing of use\n", "it has no JSON line with a 'phase'"),
        ('{"phases": [], "fit": {}}', "not a plan: TypeError"),
        ('{"phases": [{"name": "a"}], "fit": {}}', "not a plan: TypeError"),
        ('{"phase": "a", "use": "a"}\n', "line 1: not a record of this version of kvpipe"),
        ('{"phase": "run_started"}\nnonsense\n{}\n', "line 2: not JSON: Expecting value"),
    ],
)
def test_a_file_that_is_no_side_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_side(path)


def test_a_directory_that_is_no_side_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such directory or file"):
        read_side(tmp_path / "nosuch")
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"there is no records\.jsonl in it"):
        read_side(tmp_path)
