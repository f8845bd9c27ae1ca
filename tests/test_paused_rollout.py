"""A rollout that is paused, as a user runs it: for a training step, or while others use its memory."""

import pytest

from tests.command import Finished, kvpipe
from tests.conftest import ONE_LAYER, SIZES, SMALL_PAUSE

pytestmark = pytest.mark.slow

SMALL = (
    *SIZES,
    ONE_LAYER,
    "engine.tp_size=2",
    "tracking=disabled",
    "repeat.times=1",
    *SMALL_PAUSE,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One cycle, of 8 samples in 4 slots: at the pause 4 are half-way, and 4 wait."""
    done = kvpipe(tmp_path_factory.mktemp("paused"), "+experiment=tiny_async_cycle", *SMALL)
    assert done.exit_code == 0, done.end["error"]
    return done


def test_the_pause_leaves_samples_half_way_and_the_resume_ends_all(run: Finished) -> None:
    paused, resumed = run.phase("rollout_paused"), run.phase("rollout_resumed")
    counts = {key: paused[f"requests_{key}"] for key in ("finished", "half_way", "waiting")}
    assert counts == {"finished": 0, "half_way": 4, "waiting": 4}
    assert 12 <= paused["decode_tokens"] < 64 == resumed["decode_tokens"]
    assert resumed["paused"] == {key: paused[key] for key in resumed["paused"]}
    passed = {check["name"]: check["passed"] for check in resumed["checks"]}
    assert passed["requests_recomputed"] is passed["continued_under_new_weights"] is True


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
    found = run.samples("rollout_resumed")
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


def test_the_policy_is_checked_over_the_tokens_of_both_weights(run: Finished) -> None:
    """Each token under the weights that made it, whatever the engine has computed of it before."""
    paused, resumed = run.phase("policy_checked_paused"), run.phase("policy_checked")
    old = run.phase("rollout_paused")["decode_tokens"]
    assert (paused["policy_tokens"], paused["policy_tokens_of_other_weights"]) == (old, 0)
    new = (resumed["policy_tokens"], resumed["policy_tokens_of_other_weights"])
    assert new == (64 - old, old)
    for checked in (paused, resumed):
        passed = {check["name"]: check["passed"] for check in checked["checks"]}
        assert passed["policy_is_synced"] is True


def test_the_page_shows_the_ranges(run: Finished) -> None:
    page = (run.run_dir / "report.html").read_text().replace("<wbr>", "")
    first = run.samples("rollout_resumed")[0]["digests"][0]
    assert f"0:{first['to']} {first['weights_digest'][:12]}" in page


@pytest.mark.nightly(finds="a pause that changes one of 128 samples, or leaves a byte behind")
def test_128_samples_are_those_of_the_rollout_without_a_pause_ten_times_in_a_row(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    done = kvpipe(
        tmp_path_factory.mktemp("paused_128"),
        "+experiment=tiny_rollout_paused",
        "tracking=disabled",
        ONE_LAYER,
        "repeat.times=10",
        "engine.context_length=64",  # what attention on a CPU takes grows with it
        "engine.max_running_requests=32",
        "sampling.max_new_tokens=4",
        "phases.rollout_paused.pause_after_tokens=260",
    )
    assert done.exit_code == 0, done.end["error"]
    names = ["", *(f"#{number}" for number in range(2, 11))]
    digests = set()
    for cycle in names:
        paused, resumed = (done.phase(f"rollout_{name}{cycle}") for name in ("paused", "resumed"))
        assert min(paused[f"requests_{key}"] for key in ("finished", "half_way", "waiting")) > 0
        assert resumed["rollout_sha256"] == done.phase(f"rollout{cycle}")["rollout_sha256"]
        assert resumed["requests"] == 128
        off = resumed["plan_error_bytes"]
        assert (off["kv"], off["params"]) == (0, 0)
        digests.add(resumed["rollout_sha256"])
    assert len(digests) == 10  # each cycle has a seed of its own
