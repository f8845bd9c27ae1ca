"""Sweeps of the real engine: no job inherits from another, and each holds its plan's bytes.

All are of a short pipeline. A sweep of one job is followed by one that has a job that fails, one
that cannot fit, one that runs and one that the first has done. ``make test-all`` runs the ready
sweep ``max_total_tokens`` as it ships, too.
"""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from kvpipe.pipeline.steps import build_steps
from tests import command
from tests.helpers_config import ROOT, compose_plain, config_of
from tests.report.html_page import Page

SWEEPS = sorted(path.stem for path in (ROOT / "conf/sweep").glob("*.yaml"))
TOKENS = "engine.max_total_tokens"
SIZES = [1024, 2048, 4096, 8192, 16384]
# 3 layers of keys and values, 2 KV heads, head_dim 128, bfloat16.
TOKEN_BYTES = 3 * 2 * 2 * 128 * 2
TOO_MANY = 100_000_000
MIXED = pytest.mark.nightly(
    finds="a job on the engine that a failed, skipped or taken over one beside it changes"
)
ALL_SIZES = pytest.mark.nightly(
    finds="a job whose bytes depend on the jobs before it, or a ready sweep that fails on an engine"
)


def kvpipe(cwd, *arguments):
    config = ("--config-dir", "mine", "pipeline=short", "tracking=disabled")
    return command.kvpipe(cwd, *config, *arguments)


def ready(records, phase="engine_ready_dummy"):
    lines = map(json.loads, Path(records).read_text().splitlines())
    return next(line for line in lines if line["phase"] == phase)


def holds_what_was_planned(job):
    expected = TOKEN_BYTES * (job["max_total_tokens"] + 1)
    assert job["kv_bytes"] == job["planned_kv_bytes"] == job["freed_bytes"] == expected
    assert job["plan_error_bytes"] == 0
    assert (job["fits"], job["same_output"]) == (True, None)
    assert job["rebuild_s"] > 0


def place(directory):
    """Return a directory with the short pipeline."""
    (directory / "mine/pipeline").mkdir(parents=True)
    (directory / "mine/pipeline/short.yaml").write_text(
        "# @package _global_\n"
        "pipeline: [jax_ready, engine_ready_dummy, kv_cache_dropped, kv_cache_rebuilt]\n"
        "phases: {}\n"
    )
    return directory


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """The ready sweep of five sizes."""
    return kvpipe(place(tmp_path_factory.mktemp("five")), "+sweep=max_total_tokens")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The ready sweep, of one size alone."""
    cwd = place(tmp_path_factory.mktemp("sweeps"))
    return kvpipe(cwd, "+sweep=max_total_tokens", f"{TOKENS}=1024")


@pytest.fixture(scope="module")
def mixed(first):
    """Sizes of another choice: one fails, one is new, one the first sweep has done, one too large."""
    sizes = f"{TOKENS}=1,512,1024,{TOO_MANY}"
    return kvpipe(first.cwd, "+sweep=max_total_tokens", sizes, "sweep.resume=true")


@pytest.mark.slow
@ALL_SIZES
def test_five_sizes_hold_the_bytes_of_their_tokens_and_one_page(five):
    end = five.end
    assert (five.exit_code, end["status"]) == (0, "passed"), five.stderr
    assert [job["max_total_tokens"] for job in end["jobs"]] == SIZES
    for job in end["jobs"]:
        holds_what_was_planned(job)


@pytest.mark.slow
@ALL_SIZES
def test_a_job_holds_the_bytes_that_it_holds_on_its_own(five):
    """The last but one job of five, after which a larger and before which smaller ones ran."""
    alone = kvpipe(five.cwd, f"{TOKENS}=8192")
    (job,) = (job for job in five.end["jobs"] if job["max_total_tokens"] == 8192)
    in_sweep = ready(Path(job["run_dir"]) / "records.jsonl")
    on_its_own = ready(alone.run_dir / "records.jsonl")
    assert in_sweep["ledger"] == on_its_own["ledger"]
    assert (
        in_sweep["memory"]["jax_device_memory_stats"]
        == (on_its_own["memory"]["jax_device_memory_stats"])
    )


@pytest.mark.slow
@MIXED
def test_the_others_finish_when_a_job_fails_and_one_cannot_fit(mixed):
    end = mixed.end
    assert (mixed.exit_code, end["exit_code"], end["status"]) == (1, 1, "failed")
    found = [(job["status"], job["exit_code"]) for job in end["jobs"]]
    assert found == [("failed", 2), ("passed", 0), ("passed", 0), ("skipped", 2)]
    failed, *passed, skipped = end["jobs"]
    for job in passed:
        holds_what_was_planned(job)
    refused = "engine.max_total_tokens: a KV cache of 1 tokens holds no request in whole pages"
    assert failed["error"].startswith(refused)
    assert (skipped["fits"], skipped["kv_bytes"]) == (False, None)
    assert skipped["planned_kv_bytes"] == TOKEN_BYTES * (TOO_MANY + 1)
    assert "the plan does not fit" in skipped["error"]
    assert f"{skipped['largest_max_total_tokens']} would fit" in skipped["error"]


@pytest.mark.slow
@MIXED
def test_a_job_that_an_earlier_sweep_has_done_is_taken_over(first, mixed):
    (taken,) = (job for job in mixed.end["jobs"] if job["taken_from"])
    assert taken["taken_from"] == first.end["jobs"][0]["run_dir"]
    assert taken["kv_bytes"] == TOKEN_BYTES * 1025
    assert f"taken over from {taken['taken_from']}\n" in mixed.stderr


@pytest.mark.slow
@MIXED
def test_the_page_of_a_run_that_was_skipped_calls_it_so(mixed):
    page = Page((Path(mixed.end["jobs"][3]["run_dir"]) / "report.html").read_text())
    assert page.text_of("p", class_="said") == "Skipped, exit code 2"
    assert page.all("div", class_="verdict")


@pytest.mark.slow
@MIXED
def test_the_command_of_a_job_of_a_ready_sweep_does_that_job_alone(mixed):
    """The verb ``check`` replaces the run; as a sweep it would check four jobs."""
    python, dash_m, program, *words = shlex.split(mixed.end["jobs"][3]["command"])
    assert (python, dash_m, program) == ("python", "-m", "kvpipe")
    done = command.kvpipe(mixed.cwd, "check", *words)
    assert (done.stdout, done.stderr) == ("tiny: 4 steps, their order holds\n", "")


@pytest.mark.parametrize("name", SWEEPS)
def test_a_ready_sweep_says_how_it_is_run_and_each_of_its_jobs_is_accepted(name):
    text = (ROOT / f"conf/sweep/{name}.yaml").read_text()
    first, second, *_ = text.splitlines()
    assert first == "# @package _global_"
    assert second.startswith("# python -m kvpipe ")
    assert second.endswith(f"+sweep={name}")
    chosen = second.removeprefix("# python -m kvpipe ").split()
    hydra = yaml.safe_load(text)["hydra"]
    assert hydra["mode"] == "MULTIRUN"
    ((key, values),) = hydra["sweeper"]["params"].items()
    for value in str(values).split(","):
        build_steps(config_of(compose_plain(*chosen, f"{key}={value}")))


def test_the_sizes_of_the_ready_sweep_are_those_of_this_test():
    text = (ROOT / "conf/sweep/max_total_tokens.yaml").read_text()
    assert f"{TOKENS}: {','.join(map(str, SIZES))}" in text
