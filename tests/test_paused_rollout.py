"""A rollout that is paused, as a user runs it: for a training step, or while others use its memory."""

import json
from typing import Any

import pytest

from tests.command import Finished, kvpipe
from tests.conftest import ONE_LAYER, SIZES

pytestmark = pytest.mark.slow

SMALL = (
    *SIZES,
    ONE_LAYER,
    "engine.tp_size=2",
    "tracking=disabled",
    "repeat.times=1",
    "prompts.limit=4",
    "sampling.n=2",
    "sampling.max_new_tokens=8",
    "engine.max_running_requests=4",
    "phases.rollout_paused.pause_after_tokens=12",
    "trainer.batch_size=2",
    "trainer.micro_batch_size=2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One cycle, of 8 samples in 4 slots: at the pause 4 are half-way, and 4 wait."""
    done = kvpipe(tmp_path_factory.mktemp("paused"), "+experiment=tiny_async_cycle", *SMALL)
    assert done.exit_code == 0, done.end["error"]
    return done


def samples(run: Finished) -> list[dict[str, Any]]:
    text = (run.run_dir / "rollouts/rollout_resumed.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_pause_leaves_samples_half_way_and_the_resume_ends_all(run: Finished) -> None:
    paused, resumed = run.phase("rollout_paused"), run.phase("rollout_resumed")
    counts = {key: paused[f"requests_{key}"] for key in ("finished", "half_way", "waiting")}
    assert counts == {"finished": 0, "half_way": 4, "waiting": 4}
    assert 12 <= paused["decode_tokens"] < 64 == resumed["decode_tokens"]
    assert resumed["paused"] == {key: paused[key] for key in resumed["paused"]}
    passed = {check["name"]: check["passed"] for check in resumed["checks"]}
    assert passed["requests_continued"] is passed["continued_under_new_weights"] is True


def test_the_memory_of_the_paused_rollout_is_used_by_the_trainer(run: Finished) -> None:
    assert run.phase("kv_cache_offloaded")["drop_info"]["offloaded_tokens"] > 0
    held = {step: run.phase(step)["ledger"] for step in ("rollout_paused", "train_step")}
    assert "kv" in held["rollout_paused"].keys() - held["train_step"].keys()
    assert held["train_step"]["slot:trainer_params"] > 0
    assert run.phase("rollout_resumed")["plan_error_bytes"]["kv"] == 0


def test_each_sample_says_which_of_its_tokens_which_weights_made(run: Finished) -> None:
    old = run.phase("rollout_paused")["weights_digest"]
    new = run.phase("weights_synced")["weights_digest"]
    assert old != new == run.phase("rollout_resumed")["weights_digest"]
    found = samples(run)
    each = run.phase("rollout_paused")["decode_tokens"] // 4
    for sample in found[:4]:
        assert sample["digests"] == [
            {"from": 0, "to": each, "weights_digest": old},
            {"from": each, "to": 8, "weights_digest": new},
        ]
    for sample in found[4:]:
        assert sample["digests"] == [{"from": 0, "to": 8, "weights_digest": new}]
    for sample in found:
        assert len(sample["token_ids"]) == len(sample["logprobs"]) == 8


def test_the_page_shows_the_ranges(run: Finished) -> None:
    page = (run.run_dir / "report.html").read_text().replace("<wbr>", "")
    first = samples(run)[0]["digests"][0]
    assert f"0:{first['to']} {first['weights_digest'][:12]}" in page


@pytest.mark.nightly(finds="a pause that changes one of 128 samples, or leaves a byte behind")
def test_128_samples_are_those_of_the_rollout_without_a_pause(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cwd = tmp_path_factory.mktemp("paused_128")
    done = kvpipe(cwd, "+experiment=tiny_rollout_paused", "tracking=disabled")
    assert done.exit_code == 0, done.end["error"]
    paused, resumed = done.phase("rollout_paused"), done.phase("rollout_resumed")
    assert min(paused[f"requests_{key}"] for key in ("finished", "half_way", "waiting")) > 0
    assert resumed["rollout_sha256"] == done.phase("rollout")["rollout_sha256"]
    assert resumed["requests"] == 128
    off = resumed["plan_error_bytes"]
    assert (off["kv"], off["params"]) == (0, 0)
