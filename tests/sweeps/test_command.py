"""Sweeps as a user runs them, of a pipeline that needs no engine: endings, files, resume."""

import json
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpipe.cli import app
from tests import faults
from tests.command import FAKE_KEY, environment
from tests.fault_runs import WITHOUT_ENGINE
from tests.sinks import wandb_file

SWEPT = "sampling.max_new_tokens"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Phases that fail on purpose, and a pipeline whose one phase begins the W&B run."""
    directory = tmp_path_factory.mktemp("site")
    faults.write_site(directory)
    pipeline = directory / "mine/pipeline/tracked.yaml"
    pipeline.write_text("# @package _global_\npipeline: [wandb_init]\nphases: {}\n")
    return directory


def kvpipe(site, cwd, *overrides, **variables):
    return subprocess.run(
        [sys.executable, "-m", "kvpipe", "--config-dir", str(site / "mine"), "-m", *overrides],
        cwd=cwd,
        env=environment(cwd, site) | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def end_of(done):
    return json.loads(done.stdout.splitlines()[-1])


def statuses(end):
    return [job["status"] for job in end["jobs"]]


@pytest.fixture(scope="module")
def swept(site, tmp_path_factory):
    """A sweep of three jobs, the first refused for what it asks, where one W&B run is resumed."""
    cwd = tmp_path_factory.mktemp("sweep")
    resumed = {"WANDB_RUN_ID": "same", "WANDB_RESUME": "allow", "WANDB_ENTITY": "team"}
    return cwd, kvpipe(site, cwd, "pipeline=tracked", f"{SWEPT}=0,1,2", **resumed)


def test_a_job_over_several_hosts_is_refused(site, tmp_path):
    """The hosts after the first keep no records of a run that passed, so no sweep can be summarised."""
    address = "engine.dist_init_addr=127.0.0.1:9000"
    hosts = ["engine.nnodes=2", "engine.node_rank=0", address]
    done = kvpipe(site, tmp_path, "pipeline=tracked", *hosts)
    (job,) = end_of(done)["jobs"]
    assert (done.returncode, job["exit_code"]) == (1, 2)
    assert job["error"].startswith("engine.nnodes is 2, but a sweep's jobs run on one host each")


def test_a_refused_job_does_not_end_the_sweep_and_the_exit_code_is_1(swept, site):
    _, done = swept
    end = end_of(done)
    assert (done.returncode, end["phase"], end["status"]) == (1, "sweep_finished", "failed")
    assert statuses(end) == ["failed", "passed", "passed"]
    refused = end["jobs"][0]
    assert refused["exit_code"] == 2
    assert refused["error"] == f"{SWEPT} is 0, it must be at least 1"
    assert refused["values"] == {SWEPT: "0"}
    words = ["--config-dir", str(site / "mine"), "pipeline=tracked", f"{SWEPT}=0"]
    assert refused["command"] == shlex.join(["python", "-m", "kvpipe", *words])
    assert f"kvpipe: {SWEPT} is 0" in done.stderr


def test_a_sweep_leaves_its_record_and_its_page_and_the_verb_report_makes_them_again(swept):
    cwd, done = swept
    folder = Path(end_of(done)["sweep_dir"])
    assert folder.parent == cwd / "multirun"
    assert json.loads((folder / "sweep.json").read_text()) == end_of(done)
    assert "3 jobs: 1 failed, 2 held." in (folder / "sweep.html").read_text()
    before = (folder / "sweep.json").read_text()
    for name in ("sweep.json", "sweep.html"):
        (folder / name).unlink()
    again = subprocess.run(
        [sys.executable, "-m", "kvpipe", "report", str(folder)],
        cwd=cwd,
        env=environment(cwd),
        capture_output=True,
        text=True,
    )
    assert again.stdout.split() == [str(folder / "sweep.json"), str(folder / "sweep.html")]
    assert (folder / "sweep.json").read_text() == before


def test_the_jobs_of_a_sweep_are_one_group_in_wandb(swept):
    cwd, done = swept
    files = sorted(cwd.glob("multirun/*/*/wandb/*/*.wandb"))
    groups = {wandb_file.read(file)["group"] for file in files}
    assert (len(files), groups) == (2, {Path(end_of(done)["sweep_dir"]).name})


def test_each_job_of_a_sweep_is_a_wandb_run_of_its_own_whatever_the_environment_says(swept):
    cwd, done = swept
    ids = {wandb_file.read(file)["id"] for file in cwd.glob("multirun/*/*/wandb/*/*.wandb")}
    assert len(ids - {"same"}) == 2
    reported = "kvpipe: not read: WANDB_RESUME, WANDB_RUN_ID; each run is a new W&B run\n"
    assert done.stderr.count(reported) == 2


def test_a_name_from_the_environment_is_in_the_recorded_config(swept):
    cwd, done = swept
    files = cwd.glob("multirun/*/[12]/records.jsonl")
    started = [json.loads(file.read_text().splitlines()[0]) for file in files]
    assert [record["config"]["tracking"]["entity"] for record in started] == ["team", "team"]
    assert done.stderr.count("kvpipe: tracking.entity is 'team', from WANDB_ENTITY\n") == 2


def test_resume_runs_only_what_has_not_passed_and_says_what_it_took_over(swept, site):
    cwd, done = swept
    first = Path(end_of(done)["sweep_dir"])
    again = kvpipe(
        *(site, cwd, "pipeline=tracked", f"{SWEPT}=0,2,3", "sweep.resume=true"),
        *("tracking=disabled", "hydra.sweep.dir=multirun/again"),
    )
    end = end_of(again)
    assert (again.returncode, statuses(end)) == (1, ["failed", "passed", "passed"])
    assert [job["taken_from"] for job in end["jobs"]] == [None, str(first / "2"), None]
    reported = f"kvpipe: not run again, its records are taken over from {first / '2'}\n"
    assert again.stderr.count("taken over") == again.stderr.count(reported) == 1
    copied = cwd / "multirun/again/1/records.jsonl"
    assert copied.read_bytes() == (first / "2/records.jsonl").read_bytes()
    assert (copied.parent / "report.html").is_file()
    started = [json.loads(line)["phase"] for line in again.stdout.splitlines()]
    assert started.count("run_started") == 1
    in_place = kvpipe(
        *(site, cwd, "pipeline=tracked", f"{SWEPT}=2,3", "sweep.resume=true"),
        *("tracking=disabled", "hydra.sweep.dir=multirun/again"),
    )
    assert (in_place.returncode, in_place.stderr.count("taken over")) == (0, 2)
    assert [Path(job["run_dir"]).name for job in end_of(in_place)["jobs"]] == ["0", "1"]
    assert "run_started" not in in_place.stdout


def test_what_ran_with_another_config_or_version_or_cannot_be_read_is_not_taken_over(
    swept, site, tmp_path
):
    _, done = swept
    passed = (Path(end_of(done)["sweep_dir"]) / "1/records.jsonl").read_text()
    assert passed.count('"page_size": 1,') == passed.count('"kvpipe": "') == 1
    for number, text in enumerate(
        [
            passed.replace('"kvpipe": "', '"kvpipe": "0.'),
            passed.replace('"page_size": 1,', '"page_size": 4,'),
            passed.splitlines()[0] + "\n",
            "no JSON\n",
        ]
    ):
        records = tmp_path / f"multirun/old/{number}/records.jsonl"
        records.parent.mkdir(parents=True)
        records.write_text(text)
    again = kvpipe(
        *(
            site,
            tmp_path,
            "pipeline=tracked",
            "tracking=disabled",
            f"{SWEPT}=1",
            "sweep.resume=true",
        )
    )
    assert (again.returncode, "taken over" in again.stderr) == (0, False)


def test_a_secret_in_a_job_is_written_nowhere(site, tmp_path):
    done = kvpipe(site, tmp_path, "pipeline=tracked", f"model.id={FAKE_KEY},b", "tracking=disabled")
    assert done.returncode == 2
    assert done.stderr == (
        "kvpipe: model.id: this contains the secret in the variable WANDB_API_KEY, and would be "
        "recorded and uploaded; take it out, or unset WANDB_API_KEY if it is not a secret\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_over_experiments_has_one_directory_and_a_pipe_gets_a_table_if_it_asks(
    site, tmp_path
):
    own = ("pipeline=tracked", "tracking=disabled", "phases={}", "output=table")
    done = kvpipe(site, tmp_path, "+experiment=tiny,tiny_stream", *own)
    assert "passed (2 jobs: 2 held, exit code 0)" in done.stdout
    (file,) = tmp_path.glob("multirun/*/sweep.json")
    jobs = json.loads(file.read_text())["jobs"]
    assert [Path(job["run_dir"]).parent for job in jobs] == [file.parent] * 2
    assert [job["values"] for job in jobs] == [
        {"experiment": "tiny"},
        {"experiment": "tiny_stream"},
    ]


def test_what_hydra_calls_can_be_sent_to_another_process():
    task = app.Task("report", [Path("a")], [1])
    assert pickle.loads(pickle.dumps(task)) == task


@pytest.mark.nightly(
    finds="a Ctrl-C that ends a job of a sweep and not the sweep, or loses its record"
)
def test_ctrl_c_ends_a_sweep_and_leaves_what_there_is(site, tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", WITHOUT_ENGINE, "--config-dir", str(site / "mine"), "-m"),
            *("pipeline=without_engine", "phases.fault.how=wait"),
            *(f"{SWEPT}=1,2", "tracking=disabled"),
        ],
        cwd=tmp_path,
        env=environment(tmp_path, site),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "worker.pid").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    end = json.loads(stdout.splitlines()[-1])
    assert process.returncode == end["exit_code"] == 130
    assert (end["status"], statuses(end)) == ("interrupted", ["interrupted", "not begun"])
    (page,) = tmp_path.glob("multirun/*/sweep.html")
    assert ">Interrupted</p>" in page.read_text()
