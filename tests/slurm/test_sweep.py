"""Sweeps through submitit on a real SLURM: where its jobs end up, and what becomes of lost ones.

The sweep that goes well has jobs without an engine; ``make test-all`` runs the one of the guide, as
it is there, and those whose jobs are ended from outside.
"""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests import faults
from tests.fault_runs import environment, survivors
from tests.helpers_config import ROOT
from tests.slurm.cluster import Queued
from tests.test_readme import README, named_files

GUIDE = (ROOT / "docs/guide/cluster.md").read_text()
(COMMAND,) = re.findall(r"^```bash\n(.*-m hydra/launcher=slurm.*)\n```", GUIDE, re.MULTILINE)
WITHOUT_AN_ENGINE = (
    "python -m kvpipe --config-dir mine -m hydra/launcher=slurm hydra.launcher.gres=tpu:1 "
    "hydra.launcher.array_parallelism=8 tracking=disabled pipeline=none "
    "engine.max_total_tokens=512,1024"
)
OWN = """
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase


class Own(WorkerPhase):
    effect = Effect()

    def run(self, ctx):
        return Result({"file": __file__})
"""
OF_THE_GUIDE = pytest.param(
    COMMAND,
    marks=[
        pytest.mark.slow,
        pytest.mark.nightly(finds="a guide's command, or a job with an engine, that fails there"),
    ],
)
LOST = pytest.mark.nightly(finds="a job that was killed or cancelled and hangs the sweep or stays")
PATIENCE_S = 300


def start(cluster, cwd, *command):
    """Start a command that submits to the cluster; its stdout and stderr go to files of ``cwd``."""
    (cwd / "tmp").mkdir()
    with (cwd / "stdout").open("w") as stdout, (cwd / "stderr").open("w") as stderr:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(cwd, cwd / "site") | cluster.environ,
            stdout=stdout,
            stderr=stderr,
        )


def sweep_of(cwd):
    """Return what the sweep reported of its jobs on stdout, which holds nothing else."""
    (line,) = (cwd / "stdout").read_text().splitlines()
    return json.loads(line)


def wait_for(read, launcher):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := read():
            return found
        assert launcher.poll() is None, "the sweep ended too early"
        time.sleep(0.1)
    raise AssertionError("the jobs did not get there")


@dataclass
class Going:
    """A sweep under way, and the queue as it was twice a second."""

    cwd: Path
    launcher: subprocess.Popen
    queues: list[list[Queued]] = field(default_factory=list)

    def watch(self, cluster):
        """Look until it has ended."""
        deadline = time.monotonic() + PATIENCE_S
        try:
            while self.launcher.poll() is None:
                assert time.monotonic() < deadline, "the sweep did not end"
                self.queues.append(cluster.queue())
                time.sleep(0.5)
        finally:
            self.launcher.terminate()


@pytest.fixture(scope="module", params=[WITHOUT_AN_ENGINE, OF_THE_GUIDE], ids=["bare", "guide"])
def swept(cluster, tmp_path_factory, request):
    """A sweep that goes well, ended; its directory has the README's files."""
    cwd = tmp_path_factory.mktemp("swept")
    bare = (
        "# @package _global_\npipeline: [jax_ready, own]\nphases: {}\nphase_path: [mine/phases]\n"
    )
    own = {"mine/pipeline/none.yaml": bare, "mine/phases/own.py": OWN}
    for name, content in {**named_files(README, "yaml"), **own}.items():
        path = cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    python = str(Path(sys.executable).parent)
    line = f"PATH={python}:$PATH; {request.param}"
    sweep = Going(cwd, start(cluster, cwd, "bash", "-c", line))
    sweep.watch(cluster)
    assert sweep.launcher.returncode == 0, (cwd / "stderr").read_text()
    return sweep


def sizes_of(sweep):
    """Return the values of its jobs, as its command line has them."""
    (sizes,) = re.findall(r"max_total_tokens=(\S+)", sweep.launcher.args[-1])
    return sizes.split(",")


def test_every_job_of_a_sweep_passes_and_is_in_its_summary(swept):
    sweep = sweep_of(swept.cwd)
    assert (sweep["phase"], sweep["status"], sweep["exit_code"]) == ("sweep_finished", "passed", 0)
    found = [(job["values"]["engine.max_total_tokens"], job["status"]) for job in sweep["jobs"]]
    assert found == [(size, "passed") for size in sizes_of(swept)]
    page = (Path(sweep["sweep_dir"]) / "sweep.html").read_text()
    assert all(f">{tokens}<" in page or f"{int(tokens):,}" in page for tokens, _ in found)


@pytest.mark.parametrize("swept", [OF_THE_GUIDE], indirect=True)
def test_the_guides_jobs_have_the_bytes_that_were_planned_for_them(swept):
    jobs = sweep_of(swept.cwd)["jobs"]
    assert all(job["kv_bytes"] == job["planned_kv_bytes"] > 0 for job in jobs)
    assert [job["plan_error_bytes"] for job in jobs] == [0] * len(sizes_of(swept))


@pytest.mark.parametrize("swept", [WITHOUT_AN_ENGINE], indirect=True)
def test_a_phase_of_ones_own_is_found_on_the_nodes(swept):
    for records in Path(sweep_of(swept.cwd)["sweep_dir"]).glob("*/records.jsonl"):
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        (record,) = (line for line in lines if line["phase"] == "own")
        (origin,) = (at for name, at in lines[0]["versions"].items() if name == "phase own")
        assert record["file"] == origin.partition(" ")[0] == str(swept.cwd / "mine/phases/own.py")


def test_the_records_and_logs_of_each_job_are_in_the_sweeps_directory(swept):
    sweep_dir = Path(sweep_of(swept.cwd)["sweep_dir"])
    logs = sorted(sweep_dir.glob(".submitit/*_*/*_log.out"))
    for number, log in enumerate(logs):
        records = (sweep_dir / f"{number}/records.jsonl").read_text()
        assert json.loads(records.splitlines()[-1])["run_dir"] == str(sweep_dir / f"{number}")
        assert records in log.read_text()
    assert len(logs) == len(sizes_of(swept))


def test_jobs_that_ask_for_the_one_tpu_wait_for_each_other(swept):
    jobs = [[job for job in queue if job.name == "kvpipe"] for queue in swept.queues]
    assert max(sum(job.state == "RUNNING" for job in queue) for queue in jobs) == 1
    assert "Resources" in {job.reason for queue in jobs for job in queue if job.state == "PENDING"}


def test_the_state_of_the_cluster_is_reported_while_the_sweep_waits(swept):
    reported = re.findall(r"SLURM job \d+: (.*)", (swept.cwd / "stderr").read_text())
    assert any(line.endswith("1 RUNNING") and "PENDING" in line for line in reported)


def test_a_resource_that_the_cluster_lacks_is_refused_at_once(cluster, tmp_path):
    command = [sys.executable, "-m", "kvpipe", "-m", "hydra/launcher=slurm"]
    launcher = start(cluster, tmp_path, *command, "hydra.launcher.gres=tpu:2")
    assert launcher.wait(60) == 2
    message = (tmp_path / "stderr").read_text().partition("kvpipe: ")[2]
    assert message.startswith("hydra/launcher: SLURM accepted no job: ")
    assert "Requested node configuration is not available" in message


def started_waiting(cluster, cwd, name, *overrides):
    """Start a sweep whose jobs wait in a step, without an engine, until something ends them."""
    faults.write_site(cwd / "site")
    return start(
        cluster,
        cwd,
        *(sys.executable, "-m", "kvpipe", "--config-dir", "site/mine", "-m"),
        *("hydra/launcher=slurm", f"hydra.launcher.name={name}", *overrides),
        *("pipeline=no_wandb", "phases.fault.how=wait", "engine.max_total_tokens=512,1024,2048"),
    )


def waiting_worker(cwd, launcher):
    """Return the process of the job that has come to its step, and remove its file for the next one."""
    pid_file = cwd / "worker.pid"
    worker = psutil.Process(
        int(wait_for(lambda: pid_file.exists() and pid_file.read_text(), launcher))
    )
    pid_file.unlink()
    return worker


@dataclass
class Lost:
    """Two sweeps whose jobs were ended from outside.

    Attributes:
        cwd: where one was begun whose first job was killed, whose second was cancelled in the
            queue, and whose third was cancelled while it ran.
        exit_code: that of its command.
        interrupted_cwd: where one was begun whose command got Ctrl-C during the first job.
        interrupted_exit_code: that of its command.
        queue: the cluster's when both ran.
    """

    cwd: Path
    exit_code: int
    interrupted_cwd: Path
    interrupted_exit_code: int
    queue: list[Queued]


@pytest.fixture(scope="module")
def lost(cluster, tmp_path_factory):
    cwd, interrupted_cwd = tmp_path_factory.mktemp("lost"), tmp_path_factory.mktemp("interrupted")
    launcher = started_waiting(cluster, cwd, "lost", "hydra.launcher.gres=tpu:1")
    interrupted = started_waiting(cluster, interrupted_cwd, "interrupted")
    first = waiting_worker(cwd, launcher)
    waiting_worker(interrupted_cwd, interrupted)
    queue = cluster.queue()
    array = next(job for job in queue if job.name == "lost").job_id.partition("_")[0]
    cluster.ask("scancel", f"{array}_1")
    first.parent().kill()
    interrupted.send_signal(signal.SIGINT)
    waiting_worker(cwd, launcher)
    cluster.ask("scancel", f"{array}_2")
    ended = launcher.wait(PATIENCE_S)
    return Lost(cwd, ended, interrupted_cwd, interrupted.wait(PATIENCE_S), queue)


@LOST
def test_jobs_that_ask_for_no_tpu_run_beside_one_that_has_it(lost):
    running = [job.name for job in lost.queue if job.state == "RUNNING"]
    assert sorted(running) == ["interrupted", "lost"]


@LOST
def test_jobs_that_left_no_result_hang_nothing_and_are_named(lost):
    sweep = sweep_of(lost.cwd)
    assert [job["status"] for job in sweep["jobs"]] == ["unfinished", "not begun", "interrupted"]
    assert lost.exit_code == sweep["exit_code"] == 143
    assert "kvpipe: a job left no result: Job " in (lost.cwd / "stderr").read_text()


@LOST
def test_a_cancelled_job_ends_its_run_in_order(lost):
    job = sweep_of(lost.cwd)["jobs"][2]
    last = json.loads((Path(job["run_dir"]) / "records.jsonl").read_text().splitlines()[-1])
    assert (last["status"], last["exit_code"]) == ("interrupted", 143)
    assert last["error"].startswith("SIGTERM ended the run")


@LOST
def test_ctrl_c_cancels_the_jobs_and_waits_for_their_records(lost):
    sweep = sweep_of(lost.interrupted_cwd)
    assert [job["status"] for job in sweep["jobs"]] == ["interrupted", "not begun", "not begun"]
    assert lost.interrupted_exit_code == sweep["exit_code"] == 143
    assert "Traceback" not in (lost.interrupted_cwd / "stderr").read_text()


@LOST
def test_no_process_of_a_lost_or_cancelled_job_stays(lost):
    assert survivors(lost.cwd) == survivors(lost.interrupted_cwd) == []
