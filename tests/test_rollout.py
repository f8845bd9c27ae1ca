"""A rollout as a user runs it: its samples are the same after a flush and after a rebuilt KV cache."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kvpipe.pipeline.rollout import seed_of
from tests.command import Finished, kvpipe
from tests.conftest import ONE_LAYER, SIZES
from tests.sinks import wandb_file

pytestmark = pytest.mark.slow

FEW = pytest.param(4, marks=pytest.mark.small)
ALL = pytest.param(32, marks=pytest.mark.nightly(finds="a sample that a long queue changes"))
ROLLOUTS = ["rollout", "rollout_control", "rollout_after_kv_rebuild"]
# Random weights and a swap are other tests'; their programs take as long to compile as the rollout's.
STREAMED = (
    "pipeline_edit.remove=[mllm_params_cpu_ready,sglang_param_dict_ready,after_cleanup]",
    "pipeline_edit.replace.engine_ready_dummy=engine_ready_empty",
    "pipeline_edit.replace.weights_swapped_from_mllm=weights_streamed",
    "+phases.weights_streamed.probe_tokens=0",
)


@pytest.fixture(scope="module", params=[FEW, ALL], ids="{} prompts".format)
def prompts(request: pytest.FixtureRequest) -> int:
    """Number of the experiment's prompts that a run takes; each has four samples."""
    return request.param


@pytest.fixture(scope="module")
def run(prompts: int, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The experiment with some of its prompts; W&B offline, JSON piped."""
    cwd = tmp_path_factory.mktemp("rollout")
    few = (
        *SIZES,
        *STREAMED,
        ONE_LAYER,
        "engine.tp_size=2",
        "engine.max_running_requests=16",
        f"prompts.limit={prompts}",
    )
    return kvpipe(cwd, "+experiment=tiny_rollout", *few, "runner.heartbeat_s=null")


def test_all_samples_are_the_same_after_a_flush_and_after_a_rebuild(
    run: Finished, prompts: int
) -> None:
    assert (run.exit_code, run.stderr) == (0, "")
    passed = {check["name"]: check["passed"] for check in run.end["checks"]}
    assert passed["aa_control"] is passed["same_rollout"] is True
    first, *others = (run.samples(step) for step in ROLLOUTS)
    assert len(first) == 4 * prompts
    for later in others:
        for key in ("prompt", "index", "seed", "token_ids", "logprobs", "text"):
            assert [s[key] for s in later] == [s[key] for s in first], key
    assert run.phase("kv_cache_dropped")["drop_info"]["freed_bytes"] > 0


def test_the_samples_of_a_prompt_are_distinct(run: Finished, prompts: int) -> None:
    """At temperature 1 this model is sure of most tokens, so a few samples coincide."""
    distinct = {(s["prompt"], tuple(s["token_ids"])) for s in run.samples("rollout")}
    assert len(distinct) == run.phase("rollout")["distinct_samples"] > 0.9 * 4 * prompts


def test_each_prompt_has_four_samples_in_the_order_of_the_file(run: Finished, prompts: int) -> None:
    found = run.samples("rollout")
    file = Path(__file__).parents[1] / "conf/prompts/additions.jsonl"
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()][:prompts]
    assert [(s["prompt"], s["index"]) for s in found] == [(i, n) for i in ids for n in range(4)]
    assert [s["seed"] for s in found] == [seed_of(0, i, n) for i in ids for n in range(4)]


def test_the_record_counts_what_the_file_has(run: Finished, prompts: int) -> None:
    record, found = run.phase("rollout"), run.samples("rollout")
    assert (record["requests"], record["prompts"]) == (4 * prompts, prompts)
    for key, of in {"decode_tokens": "token_ids", "finish_reasons": "finish_reason"}.items():
        values = [s[of] for s in found]
        counted = sum(map(len, values)) if of == "token_ids" else dict(Counter(values))
        assert record[key] == counted
    for key in ("prompt_tokens", "cached_tokens"):
        assert record[key] == sum(s[key] for s in found)
    assert record["samples"] == found[:8]
    assert {s["weights_digest"] for s in found} == {record["weights_digest"]}
    assert record["forward_steps"] < record["decode_tokens"]
    assert record["sampling_params"]["seed"] == 0


def test_every_token_has_its_log_probability(run: Finished) -> None:
    for sample in run.samples("rollout"):
        assert len(sample["logprobs"]) == len(sample["token_ids"]) == 16
        assert all(value <= 0 for value in sample["logprobs"])


def test_wandb_and_the_page_have_the_first_samples_and_the_speed(
    run: Finished, prompts: int
) -> None:
    (path,) = run.run_dir.glob("wandb/*/*.wandb")
    history = wandb_file.read(path)["history"]
    rows = {row["phase/name"]: row for row in history if "phase/name" in row}
    for step in ROLLOUTS:
        speed = run.phase(step)["tokens_per_second"]
        assert rows[step]["rollout/tokens_per_second"] == speed
        assert rows[step]["rollout/requests"] == 4 * prompts
    (table,) = path.parent.glob("files/media/table/rollout/samples_*.json")
    logged = json.loads(table.read_text())
    shown = [s for step in ROLLOUTS for s in run.phase(step)["samples"]]
    assert [row[3] for row in logged["data"]] == [s["text"] for s in shown]
    assert len(shown) == 8 * len(ROLLOUTS)
    page = (run.run_dir / "report.html").read_text()
    assert run.phase("rollout")["rollout_sha256"][:12] in page
