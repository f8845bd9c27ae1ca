"""Whatever goes wrong, a run leaves a truthful record and a clean machine: a matrix of faults.

Each cell is a real run, of the command, that something happens to. They run in two places at a time,
and in one place one after the other: each is the next run of the one before it, which it shows to
have left nothing that disturbs.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests import faults
from tests.command import FAKE_KEY, WITHOUT_JAX
from tests.sinks import wandb_file, wandb_server

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "0Secret9" * 5
MARK = "KVPIPE_TEST_CELL"
PATIENCE_S = 120
AFTER_FAULT = ["after", "cleaning"]
Act = Callable[["Running"], None]


@dataclass(frozen=True)
class Cell:
    """What is done to a run, and how the run has to end.

    Attributes:
        exit_code: what it ends with.
        error: a part of the message in its last record.
        how: what the step ``fault`` does.
        kind: what the step ``fault`` is.
        pipeline: a pipeline of :mod:`tests.faults`.
        overrides: more overrides.
        act: what happens to the run from outside.
        failing: the step that the last record blames.
        cleaned: whether the cleaning step was run after the failure.
        respond: how the W&B server answers; none is there without it.
        disk_bytes: size of a disk for the run directory alone.
    """

    exit_code: int
    error: str
    how: str = "nothing"
    kind: str = "changes"
    pipeline: str = "faulty"
    overrides: tuple[str, ...] = ()
    act: Act | None = None
    failing: str = "fault"
    cleaned: bool = False
    respond: Callable | None = None
    disk_bytes: int | None = None


@dataclass
class Running:
    """A run under way."""

    process: subprocess.Popen
    cwd: Path
    server: wandb_server.Server | None = None

    def worker(self):
        """The id of its worker, once that has come to the step that waits."""
        return int(self.wait_for(lambda: (self.cwd / "worker.pid").read_text()))

    @property
    def run_dir(self):
        """Its run directory: the last, since one run after the other has this place."""
        return max((self.cwd / "outputs/tiny").iterdir())

    def wait_for(self, read):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if found := read():
                    return found
            except (FileNotFoundError, ValueError):
                pass
            assert self.process.poll() is None, "the run ended too early"
            time.sleep(0.05)
        raise AssertionError("the run did not get there")


@dataclass
class Ended:
    """What a run left."""

    exit_code: int
    stdout: str
    stderr: str
    run_dir: Path
    took_s: float
    survivors: list[str] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)

    @property
    def records(self):
        return [json.loads(line) for line in (self.run_dir / "records.jsonl").open()]

    @property
    def end(self):
        return self.records[-1]

    def record(self, phase):
        (found,) = (record for record in self.records if record["phase"] == phase)
        return found


def to_worker(signum):
    return lambda run: os.kill(run.worker(), signum)


def to_parent(signum):
    def act(run):
        run.worker()
        run.process.send_signal(signum)

    return act


def to_both(signum):
    """As a cluster does; the worker, which takes no signal, ends first."""

    def act(run):
        os.kill(run.worker(), signum)
        run.process.send_signal(signum)

    return act


def interrupt_twice(run):
    """Ctrl-C, and again while W&B, whose server is stuck, is being finished."""
    run.worker()
    run.server.respond = wandb_server.never
    run.process.send_signal(signal.SIGINT)
    run.wait_for(lambda: '"phase": "fault"' in (run.run_dir / "records.jsonl").read_text())
    time.sleep(1.0)
    run.process.send_signal(signal.SIGINT)


def server_goes(run):
    worker = run.worker()
    run.server.stop()
    os.kill(worker, signal.SIGUSR2)


def server_gets_stuck(run):
    worker = run.worker()
    run.server.respond = wandb_server.never
    os.kill(worker, signal.SIGUSR2)


def kill_wandb(run):
    worker = run.worker()
    for child in psutil.Process(run.process.pid).children(recursive=True):
        if child.name().startswith("wandb-core"):
            child.kill()
    os.kill(worker, signal.SIGUSR2)


def reader_goes(run):
    worker = run.worker()
    run.process.stdout.close()
    os.kill(worker, signal.SIGUSR2)


ONLINE = ("tracking=online", "tracking.finish_timeout_s=2", "tracking.init_timeout_s=5")
NO_LIMIT = "tracking.finish_timeout_s=60"
GO_ON = ("runner.on_error=continue",)

CELLS = {
    # An exception in each kind of phase.
    "exception in a phase that changes": Cell(
        3, "step 'fault': ValueError: a fault of the tests", "exception", cleaned=True
    ),
    "exception in a phase that measures": Cell(
        3, "ValueError: a fault", "exception", "measures", cleaned=True
    ),
    "exception in a phase that measures, going on": Cell(
        3, "ValueError: a fault", "exception", "measures", overrides=GO_ON
    ),
    "failed check in a phase that measures, going on": Cell(
        1, "a check of the tests: expected 1, it was 2", "failed_check", "measures", overrides=GO_ON
    ),
    "exception in a phase that changes, asked to go on": Cell(
        3, "ValueError: a fault", "exception", overrides=GO_ON, cleaned=True
    ),
    "exception in a phase that cleans": Cell(
        3, "ValueError: a fault", "exception", "cleans", cleaned=True
    ),
    "exception in a phase of the parent": Cell(
        3, "ValueError: a fault", pipeline="in_the_parent", failing="fault_parent"
    ),
    # Signals to the worker.
    "SIGKILL to the worker": Cell(
        3, "SIGKILL in step 'fault', and Linux counts no", "wait", act=to_worker(signal.SIGKILL)
    ),
    "SIGQUIT to the worker": Cell(3, "by SIGQUIT", "wait", act=to_worker(signal.SIGQUIT)),
    "SIGTERM to the worker": Cell(3, "by SIGTERM", "wait", act=to_worker(signal.SIGTERM)),
    "SIGINT to the worker": Cell(3, "by SIGINT", "wait", act=to_worker(signal.SIGINT)),
    # Signals to the parent.
    "SIGINT": Cell(130, "SIGINT ended the run", "wait", act=to_parent(signal.SIGINT)),
    "SIGTERM": Cell(143, "SIGTERM ended the run", "wait", act=to_parent(signal.SIGTERM)),
    "SIGHUP": Cell(129, "SIGHUP ended the run", "wait", act=to_parent(signal.SIGHUP)),
    "SIGQUIT": Cell(131, "SIGQUIT ended the run", "wait", act=to_parent(signal.SIGQUIT)),
    "SIGUSR2": Cell(140, "SIGUSR2 ended the run", "wait", act=to_parent(signal.SIGUSR2)),
    "SIGTERM to parent and worker": Cell(
        143, "SIGTERM ended the run", "wait", act=to_both(signal.SIGTERM)
    ),
    "SIGINT twice": Cell(
        130,
        "SIGINT ended the run",
        "wait",
        overrides=(*ONLINE, NO_LIMIT),
        act=interrupt_twice,
        respond=wandb_server.well_behaved,
    ),
    # The worker ends by itself.
    "abort": Cell(3, "by SIGABRT", "abort"),
    "segmentation fault": Cell(3, "by SIGSEGV", "segfault"),
    "an exit in the middle": Cell(3, "by exit code 0", "leave"),
    "a worker that is killed while it has children": Cell(3, "SIGKILL", "child"),
    # Memory.
    "no host memory": Cell(4, "MemoryError", "host_memory", cleaned=True),
    "no device memory": Cell(4, "RESOURCE_EXHAUSTED", "device_memory", cleaned=True),
    # Time.
    "a hung phase": Cell(
        5,
        "step 'fault' took longer than runner.phase_timeouts.fault = 1 s",
        "wait",
        overrides=("runner.phase_timeouts.fault=1",),
    ),
    "a hung run": Cell(
        5,
        "the run took longer than runner.run_timeout_s = 0.5 s; it was in step 'run_planned'",
        overrides=("runner.run_timeout_s=0.5",),
        failing="run_planned",
    ),
    # The disk, and who reads.
    "a full disk": Cell(3, "No space left on device", "fill_disk", disk_bytes=64 << 20),
    "a reader that has gone": Cell(
        3, "<stdout>: cannot write the record", "wait_for_signal", act=reader_goes
    ),
    # W&B.
    "no W&B server at the start": Cell(
        3, "Connection refused", overrides=ONLINE, failing="wandb_init"
    ),
    "the W&B server goes in the middle": Cell(
        3,
        "W&B did not finish the run",
        "wait_for_signal",
        overrides=ONLINE,
        act=server_goes,
        respond=wandb_server.well_behaved,
        failing=None,
    ),
    "the W&B server gets stuck at the end": Cell(
        3,
        "W&B did not finish the run: Timed out",
        "wait_for_signal",
        overrides=ONLINE,
        act=server_gets_stuck,
        respond=wandb_server.well_behaved,
        failing=None,
    ),
    "W&B's service is killed": Cell(
        3, "W&B did not take the row of 'fault'", "wait_for_signal", act=kill_wandb
    ),
    # The engine.
    "a thread of the engine fails": Cell(
        3, "the engine failed: ", "generate_while_dropped", pipeline="on_the_engine"
    ),
    "SIGQUIT to the worker with an engine": Cell(
        3,
        "the engine failed: ",
        "wait_for_signal",
        pipeline="on_the_engine",
        act=to_worker(signal.SIGQUIT),
    ),
    "exception beside an engine": Cell(
        3, "ValueError: a fault", "exception", pipeline="on_the_engine", cleaned=True
    ),
}
UNDISTURBED = Cell(0, "", pipeline="on_the_engine")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The phases that fail, and their pipelines."""
    directory = tmp_path_factory.mktemp("site")
    faults.write_site(directory)
    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Working directories, each with a thread that does one run in it after the other."""
    made = [(ThreadPoolExecutor(1), tmp_path_factory.mktemp("place")) for _ in range(2)]
    yield made
    for thread, _ in made:
        thread.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def cells(request, site, places, tmp_path_factory):
    """The runs of those cells that are asked for, each of which may have ended or not.

    One with a disk of its own has a place of its own: the disk would hide what is there.
    """
    asked = [item.callspec.params["name"] for item in request.session.items if is_cell(item)]
    turns = zip(dict.fromkeys(asked), itertools.cycle(places), strict=False)
    runs = {}
    for name, (thread, shared) in turns:
        place = tmp_path_factory.mktemp("disk") if CELLS[name].disk_bytes else shared
        runs[name] = thread.submit(carry_out, CELLS[name], site, place)
    return runs


@pytest.fixture(scope="module")
def last_runs(cells, site, places):
    """A run in each place, after all the cells, that nothing happens to."""
    return [thread.submit(carry_out, UNDISTURBED, site, place) for thread, place in places]


def is_cell(item):
    return item.fspath == __file__ and hasattr(item, "callspec") and "name" in item.callspec.params


def carry_out(cell, site, cwd):
    """Do what the cell says, and look at what is left on the machine."""
    temporary = cwd / "tmp"
    temporary.mkdir(exist_ok=True)
    (cwd / "worker.pid").unlink(missing_ok=True)
    with disk(cwd / "outputs", cell.disk_bytes), server(cell.respond) as served:
        running = start(arguments(cell), site, cwd, served)
        if cell.act:
            cell.act(running)
        began = time.monotonic()
        stdout, stderr = running.process.communicate(timeout=PATIENCE_S)
        took_s = time.monotonic() - began
        if cell.disk_bytes:
            subprocess.run(["cp", "-a", cwd / "outputs", cwd / "kept"], check=True)
    if cell.disk_bytes:
        (cwd / "outputs").rmdir()
        (cwd / "kept").rename(cwd / "outputs")
    ended = Ended(running.process.returncode, stdout, stderr, running.run_dir, took_s)
    ended.survivors = survivors(cwd)
    ended.temporary = [path.name for path in temporary.iterdir()]
    return ended


def arguments(cell):
    return [
        f"pipeline={cell.pipeline}",
        *([f"phases.fault.how={cell.how}"] if cell.how != "nothing" else []),
        *([f"phases.fault.use=fault_{cell.kind}"] if cell.kind != "changes" else []),
        *cell.overrides,
    ]


def environment(cwd, site, served=None):
    return WITHOUT_JAX | {
        MARK: str(cwd),
        "PYTHONPATH": str(site),
        "TMPDIR": str(cwd / "tmp"),
        "XDG_CACHE_HOME": str(site / "cache"),
        "WANDB_API_KEY": FAKE_KEY,
        "WANDB_BASE_URL": served.url if served else "http://127.0.0.1:9",
        "HF_TOKEN": TOKEN,
    }


@contextmanager
def server(respond):
    """A W&B server that answers so, or none."""
    if respond is None:
        yield None
        return
    with wandb_server.serve(respond) as served:
        yield served


@contextmanager
def disk(directory, size):
    """A file system of ``size`` bytes in ``directory``; nothing without a size."""
    if size is None:
        yield
        return
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of its own: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def survivors(cwd):
    """What still runs of a run, seconds after its end."""
    found = []
    for _ in range(50):
        found = [p for p in psutil.process_iter() if environ_of(p).get(MARK) == str(cwd)]
        if not found:
            break
        time.sleep(0.1)
    return [" ".join(process.cmdline()) for process in found]


def environ_of(process):
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.parametrize("name", CELLS)
def test_a_fault_ends_in_its_exit_code_and_a_truthful_record(name, cells):
    cell, run = CELLS[name], cells[name].result()
    assert run.exit_code == cell.exit_code, run.stdout + run.stderr
    end = run.end
    assert (end["phase"], end["exit_code"]) == ("run_finished", cell.exit_code)
    assert end["status"] == ("interrupted" if cell.exit_code > 128 else "failed")
    assert cell.error in end["error"]
    assert end["failing_phase"] == cell.failing
    assert end["command"].startswith("python -m kvpipe --config-dir ")
    assert f"pipeline={cell.pipeline}" in end["command"]
    assert "Traceback" not in run.stderr or cell.pipeline == "in_the_parent"


@pytest.mark.parametrize("name", CELLS)
def test_after_a_fault_every_earlier_record_and_that_of_the_failing_phase_are_there(name, cells):
    cell, run = CELLS[name], cells[name].result()
    phases = [record["phase"] for record in run.records]
    assert phases == expected_phases(cell)
    if run.stdout:
        assert [json.loads(line) for line in run.stdout.splitlines()] == run.records
    if cell.failing not in (None, "run_planned") and not cell.error.startswith(PASSED_ITSELF):
        failed = [check for check in run.record(cell.failing)["checks"] if not check["passed"]]
        assert len(failed) == 1
        assert run.end["checks"].count(failed[0]) == 1


# What fails here is a sink: the phase itself, and its record, are as they should be.
PASSED_ITSELF = ("W&B did not take", "No space left", "<stdout>")


def expected_phases(cell):
    """The records of a run that ended like this."""
    pipeline = [step.strip() for step in faults.PIPELINES[cell.pipeline][1:-1].split(",")]
    if cell.failing is None or (cell.overrides == GO_ON and cell.kind == "measures"):
        done = pipeline
    elif cell.failing == "run_planned":
        return ["run_started", "wandb_init", "run_finished"]
    else:
        done = pipeline[: pipeline.index(cell.failing) + 1] + ["cleaning"] * cell.cleaned
    if done[1:]:
        done = done[:1] + ["run_planned"] * (done[1] != "fault_parent") + done[1:]
    return ["run_started", *done, "run_finished"]


@pytest.mark.parametrize("name", CELLS)
def test_after_a_fault_nothing_of_the_run_is_left_on_the_machine(name, cells):
    run = cells[name].result()
    assert run.survivors == []
    assert run.temporary == []
    assert not [path for path in run.run_dir.iterdir() if path.name.startswith(".reserve")]


@pytest.mark.parametrize("name", CELLS)
def test_after_a_fault_the_offline_file_of_wandb_can_be_read(name, cells):
    cell, run = CELLS[name], cells[name].result()
    files = list(run.run_dir.glob("wandb/*/*.wandb"))
    assert len(files) == (cell.failing != "wandb_init")
    for path in files:
        if cell.disk_bytes:
            # Its last record, which met the full disk, may be torn; those before it are not.
            first = [
                record.WhichOneof("record_type")
                for record in itertools.islice(wandb_file.records(path), 2)
            ]
            assert "run" in first
            continue
        logged = wandb_file.read(path)
        assert logged["config"]["experiment"] == "tiny"
        if cell.act not in (kill_wandb, interrupt_twice):
            rows = [row["phase/name"] for row in logged["history"] if "phase/name" in row]
            assert rows == [p for p in expected_phases(cell) if not p.startswith("run_")]
            assert logged["summary"]["run/exit_code"] == (cell.exit_code if cell.failing else 0)


def test_the_run_after_all_faults_of_a_place_passes_as_if_nothing_had_been(last_runs):
    """So does each run in between: it ends as it should in the place of the one before it."""
    for run in (future.result() for future in last_runs):
        assert (run.exit_code, run.stderr, run.end["status"]) == (0, "", "passed")
        assert (run.survivors, run.temporary) == ([], [])


def test_a_hung_phase_leaves_the_stacks_of_all_threads(cells, request):
    run = asked_for(cells, "a hung phase")
    stacks = (run.run_dir / "stacks.txt").read_text()
    assert "in hang" in stacks
    assert stacks.count("Thread 0x") >= 2
    assert f"the stacks of its threads are in {run.run_dir}/stacks.txt" in run.end["error"]


def test_ctrl_c_twice_waits_for_nothing(cells):
    """W&B alone would have been given 60 seconds."""
    assert asked_for(cells, "SIGINT twice").took_s < 15


def test_out_of_memory_tells_what_was_held_and_what_had_been_planned(cells):
    run = asked_for(cells, "no device memory")
    assert run.end["ledger"] == run.record("fault")["ledger"]
    assert run.end["planned"]["name"] == "fault"
    assert "last measured, bytes over all devices: " in run.end["error"]
    assert "planned after 'fault': 0 bytes over all devices" in run.end["error"]


def asked_for(cells, name):
    if name not in cells:
        pytest.skip(f"the cell {name!r} was not asked for")
    return cells[name].result()


def test_a_killed_parent_takes_all_with_it_and_leaves_whole_lines(site, tmp_path):
    """Nobody is left to write a last record; but the worker and W&B's service must not stay."""
    (tmp_path / "tmp").mkdir()
    run = start(["pipeline=faulty", "phases.fault.how=wait"], site, tmp_path)
    run.worker()
    run.process.kill()
    run.process.communicate(timeout=PATIENCE_S)
    assert survivors(tmp_path) == []
    assert [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("kvpipe")] == []
    (records,) = tmp_path.glob("outputs/tiny/*/records.jsonl")
    phases = [json.loads(line)["phase"] for line in records.open()]
    assert phases == ["run_started", "wandb_init", "run_planned", "jax_ready"]
    (logged,) = tmp_path.glob("outputs/tiny/*/wandb/*/*.wandb")
    assert wandb_file.read(logged)["config"]["experiment"] == "tiny"
    # The next run, in the same place, is not hindered.
    (tmp_path / "worker.pid").unlink()
    after = start(["pipeline=faulty", "phases.fault.how=nothing"], site, tmp_path)
    stdout, stderr = after.process.communicate(timeout=PATIENCE_S)
    assert (after.process.returncode, stderr) == (0, "")
    assert json.loads(stdout.splitlines()[-1])["status"] == "passed"


def test_no_secret_that_a_run_was_given_is_in_anything_that_it_wrote(site, tmp_path):
    """One is in the environment, one in .env; a phase prints one and raises both."""
    (tmp_path / "tmp").mkdir()
    env_file = tmp_path / ".env"
    env_file.write_text(f"WANDB_API_KEY={FAKE_KEY}\n")
    env_file.chmod(0o600)
    overrides = ["pipeline=faulty", "phases.fault.how=tell_secrets", *ONLINE]
    with wandb_server.serve() as served:
        run = start(overrides, site, tmp_path, served, WANDB_API_KEY="")
        stdout, stderr = run.process.communicate(timeout=PATIENCE_S)
        asked = len(served.requests)
    assert run.process.returncode == 3
    assert "[redacted] and [redacted]" in json.loads(stdout.splitlines()[-1])["error"]
    assert asked > 0
    env_file.unlink()
    for secret in (FAKE_KEY, TOKEN):
        assert secret not in stdout + stderr
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), path
    (log,) = tmp_path.glob("outputs/tiny/*/engine.log")
    assert "a log with [redacted]" in log.read_text()


@pytest.mark.parametrize("secret", ["prompt.text=hello {key}", "+phases.fault.hf_token={key}"])
def test_a_config_that_holds_a_secret_is_refused_and_not_kept(site, tmp_path, secret):
    (tmp_path / "tmp").mkdir()
    run = start(["pipeline=no_wandb", secret.format(key=FAKE_KEY)], site, tmp_path)
    stdout, stderr = run.process.communicate(timeout=PATIENCE_S)
    assert (run.process.returncode, stdout) == (2, "")
    assert FAKE_KEY not in stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file() and FAKE_KEY in p.read_text()] == []


def start(overrides, site, cwd, served=None, **more):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpipe", "--config-dir", str(site / "conf"), *overrides],
        cwd=cwd,
        env=environment(cwd, site, served) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Running(process, cwd, served)


@pytest.fixture
def little_memory(tmp_path):
    """A cgroup with less memory than a run that eats it; for cgroups of version 1."""
    group = Path("/sys/fs/cgroup/memory") / f"kvpipe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(900 << 20))
    except OSError as error:
        pytest.skip(f"no cgroup of its own: {error}")
    yield group
    group.rmdir()


def test_a_worker_that_linux_kills_for_its_memory_is_told_as_out_of_memory(
    site, tmp_path, little_memory
):
    (tmp_path / "tmp").mkdir()
    run = start(["pipeline=no_wandb", "phases.fault.how=eat_memory"], site, tmp_path)
    (little_memory / "cgroup.procs").write_text(str(run.process.pid))
    stdout, _ = run.process.communicate(timeout=PATIENCE_S)
    end = json.loads(stdout.splitlines()[-1])
    assert run.process.returncode == end["exit_code"] == 4
    assert end["failing_phase"] == "fault"
    assert "Linux killed it for lack of memory" in end["error"]
    assert survivors(tmp_path) == []
