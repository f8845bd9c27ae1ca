"""Whatever goes wrong, a run leaves a truthful record and a clean machine: a matrix of faults.

Here it is about the parent, the protocol between the processes and the sinks, so the worker has no
engine (:mod:`tests.without_engine`). What goes wrong beside one is in tests/test_engine_faults.py.
"""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.command import FAKE_KEY
from tests.fault_runs import (
    GO_ON,
    PATIENCE_S,
    TOKEN,
    UNTRACKED,
    WITHOUT_ENGINE,
    Cell,
    Matrix,
    carry_out,
    names_of,
    start,
    survivors,
)
from tests.processes import suspend
from tests.sinks import wandb_file, wandb_server
from tests.without_engine.__main__ import SAME_SIGNAL_S

pytestmark = pytest.mark.early


def to_worker(signum):
    return lambda run: run.signal_worker(signum)


def to_parent(signum):
    return lambda run: run.interrupt(signum)


def to_worker_then_parent(signum):
    """As a cluster does; the worker, which takes no signal, has ended before the parent gets it."""

    def act(run):
        worker = psutil.Process(run.worker())
        run.signal_worker(signum)
        run.wait_for(lambda: has_ended(worker))
        time.sleep(0.5)
        run.process.send_signal(signum)

    return act


def interrupt_twice(run):
    """Ctrl-C, and again while W&B, whose server is stuck, is being finished."""
    once_wandb_has_the_row_before(run)
    run.server.respond = wandb_server.never
    run.process.send_signal(signal.SIGINT)
    # The picture is the last thing that is made before W&B is finished.
    run.wait_for(lambda: (run.run_dir / "timeline.png").exists())
    time.sleep(2 * SAME_PRESS_S)
    run.process.send_signal(signal.SIGINT)


def server_goes(run):
    once_wandb_has_the_row_before(run)
    run.server.stop()
    run.signal_worker(signal.SIGUSR2)


def server_gets_stuck(run):
    once_wandb_has_the_row_before(run)
    run.server.respond = wandb_server.never
    run.signal_worker(signal.SIGUSR2)


def once_wandb_has_the_row_before(run):
    """It gets the plan and then that row while the next step runs; its file has them in seconds."""
    run.worker()

    def has_it():
        history = [
            row
            for path in run.run_dir.glob("wandb/*/*.wandb")
            for row in wandb_file.read(path)["history"]
        ]
        return any(row.get("phase/name") == "before" for row in history)

    run.wait_for(has_it)


def kill_wandb(run):
    once_wandb_has_the_row_before(run)
    children = psutil.Process(run.process.pid).children(recursive=True)
    (service,) = [child for child in children if child.name().startswith("wandb-core")]
    service.kill()
    run.wait_for(lambda: has_ended(service))
    run.signal_worker(signal.SIGUSR2)


def stop_wandb(run):
    """Its service hangs, as on a file system that does not answer."""
    once_wandb_has_the_row_before(run)
    children = psutil.Process(run.process.pid).children()
    (service,) = [child for child in children if child.name().startswith("wandb-core")]
    suspend(service)
    run.signal_worker(signal.SIGUSR2)


def move_directory(run):
    once_wandb_has_the_row_before(run)
    run.run_dir.rename(f"{run.run_dir}.moved")
    run.signal_worker(signal.SIGUSR2)


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def reader_goes(run):
    """It reads the record of the step before, which the parent may write once the next one runs."""
    next(line for line in run.process.stdout if '"phase": "before"' in line)
    run.process.stdout.close()
    run.signal_worker(signal.SIGUSR2)


# Twice in less than this is one press (kvpipe.parent.deferred_signals).
SAME_PRESS_S = 0.25
ONLINE = ("tracking=online", "tracking.init_timeout_s=120", "tracking.finish_timeout_s=2")
AN_HOUR = "tracking.finish_timeout_s=3600"
TAKEN = "the signal is taken from kvpipe by a library that the parent loads once the run has begun"

CELLS = {
    # An exception; in a phase that changes something it is in tests/test_engine_faults.py.
    "exception in a phase that measures": Cell(
        *(3, "ValueError: a fault", "exception", "measures"),
        cleaned=True,
        finds="the worker goes on after a failed measurement although nobody has asked it to",
    ),
    "exception in a phase that measures, going on": Cell(
        *(3, "ValueError: a fault", "exception", "measures"),
        overrides=GO_ON,
        finds="the record of a step after one that raised is lost between the processes",
    ),
    "failed check in a phase that measures, going on": Cell(
        1, "a check of the tests: expected 1, it was 2", "failed_check", "measures", overrides=GO_ON
    ),
    "exception in a phase that changes, asked to go on": Cell(
        *(3, "ValueError: a fault", "exception"),
        overrides=GO_ON,
        cleaned=True,
        finds="the worker goes on after a failed change when it may go on after a measurement",
    ),
    "exception in a phase that cleans": Cell(
        *(3, "ValueError: a fault", "exception", "cleans"),
        cleaned=True,
        finds="a step that fails to clean keeps those that clean after it from their turn",
    ),
    "exception in a phase of the parent": Cell(
        *(3, "ValueError: a fault"),
        pipeline="in_the_parent",
        overrides=(UNTRACKED,),
        failing="fault_parent",
    ),
    # Signals to the worker.
    "SIGQUIT to the worker": Cell(
        *(3, "by SIGQUIT", "wait"),
        act=to_worker(signal.SIGQUIT),
        finds="the worker takes SIGQUIT although no engine is there to send it",
    ),
    "SIGTERM to the worker": Cell(
        *(3, "by SIGTERM", "wait"),
        act=to_worker(signal.SIGTERM),
        finds="a worker that was terminated alone is recorded as an interrupted run",
    ),
    "SIGINT to the worker": Cell(
        *(3, "by SIGINT", "wait"),
        act=to_worker(signal.SIGINT),
        finds="SIGINT raises KeyboardInterrupt in the worker and ends it as an exit code",
    ),
    # Signals to the parent.
    "SIGINT": Cell(
        *(130, "SIGINT ended the run", "wait"), act=to_parent(signal.SIGINT), finds=TAKEN
    ),
    "SIGTERM": Cell(
        *(143, "SIGTERM ended the run", "wait"), act=to_parent(signal.SIGTERM), finds=TAKEN
    ),
    "SIGHUP": Cell(129, "SIGHUP ended the run", "wait", act=to_parent(signal.SIGHUP)),
    "SIGQUIT": Cell(
        *(131, "SIGQUIT ended the run", "wait"), act=to_parent(signal.SIGQUIT), finds=TAKEN
    ),
    "SIGUSR2": Cell(
        *(140, "SIGUSR2 ended the run", "wait"), act=to_parent(signal.SIGUSR2), finds=TAKEN
    ),
    "SIGTERM to parent and worker": Cell(
        *(143, "SIGTERM ended the run", "wait"),
        act=to_worker_then_parent(signal.SIGTERM),
        overrides=(UNTRACKED,),
        variables={SAME_SIGNAL_S: str(PATIENCE_S)},
    ),
    "SIGINT twice": Cell(
        130,
        "SIGINT ended the run",
        "wait",
        overrides=(*ONLINE, AN_HOUR),
        act=interrupt_twice,
        rows_lost=True,
        respond=wandb_server.well_behaved,
    ),
    # The worker ends by itself.
    "abort": Cell(
        *(3, "by SIGABRT", "abort"),
        finds="a worker that aborts is not named by its signal",
    ),
    "an exit in the middle": Cell(3, "by exit code 0", "leave", overrides=(UNTRACKED,)),
    "a worker that is killed while it has children": Cell(
        3, "SIGKILL", "child", overrides=(UNTRACKED,)
    ),
    # Time.
    "a hung run": Cell(
        5,
        "the run took longer than runner.run_timeout_s = 0.5 s; it was in step 'run_planned'",
        "hang_in_the_plan",
        overrides=("runner.run_timeout_s=0.5", UNTRACKED),
        failing="run_planned",
    ),
    "the clock is set back": Cell(
        *(3, "ValueError: a fault", "set_the_clock_back"), overrides=(UNTRACKED,), cleaned=True
    ),
    # The disk, and who reads.
    "a full disk": Cell(3, "No space left on device", "fill_disk", disk_bytes=64 << 20),
    "a reader that has gone": Cell(
        *(3, "<stdout>: cannot write the record", "wait_for_signal"),
        overrides=(UNTRACKED,),
        act=reader_goes,
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
        finds="a run that waits longer for a server that has gone than for one that is stuck",
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
        3,
        "W&B did not take the row of 'fault'",
        "wait_for_signal",
        act=kill_wandb,
        failing="after",
        rows_lost=True,
        finds="a row that is counted as taken although W&B's service died",
    ),
    "W&B's service hangs": Cell(
        3,
        "W&B did not take the row of 'fault': no answer in 10 s",
        "wait_for_signal",
        overrides=("tracking.log_timeout_s=10",),
        act=stop_wandb,
        failing="after",
        rows_lost=True,
        finds="a run that does not end in its record although its sink has given W&B's service up",
    ),
    # The run's directory.
    "the run directory is moved": Cell(
        3, "records.jsonl was moved during the run", "wait_for_signal", act=move_directory
    ),
}
TRACKED = {name: cell for name, cell in CELLS.items() if cell.tracked}
UNDISTURBED = Cell(0, "")


@pytest.fixture(scope="module")
def matrix(request, tmp_path_factory):
    with Matrix(request, tmp_path_factory) as matrix:
        yield matrix


@pytest.fixture(scope="module")
def site(matrix):
    return matrix.site


@pytest.mark.parametrize("name", names_of(CELLS))
def test_a_fault_ends_in_its_exit_code_and_a_truthful_record(name, matrix):
    matrix.check_end(name)


@pytest.mark.parametrize("name", names_of(CELLS))
def test_after_a_fault_every_earlier_record_and_that_of_the_failing_phase_are_there(name, matrix):
    matrix.check_records(name)


@pytest.mark.parametrize("name", names_of(CELLS))
def test_after_a_fault_nothing_of_the_run_is_left_on_the_machine(name, matrix):
    matrix.check_machine(name)


@pytest.mark.parametrize("name", names_of(TRACKED))
def test_after_a_fault_the_offline_file_of_wandb_can_be_read(name, matrix):
    matrix.check_wandb(name)


def killed(site, cwd):
    """Kill the parent of a run; return what was left of it then, and the run after it."""
    (cwd / "worker.pid").unlink(missing_ok=True)
    run = start(WITHOUT_ENGINE, ["pipeline=without_engine", "phases.fault.how=wait"], site, cwd)
    once_wandb_has_the_row_before(run)  # what its service holds back is lost when it is killed
    run.process.kill()
    run.process.communicate(timeout=PATIENCE_S)
    left = survivors(cwd), [path.name for path in (cwd / "tmp").iterdir()]
    return run.run_dir, left, carry_out(UNDISTURBED, site, cwd)


@pytest.fixture(scope="module")
def after_all(matrix):
    """After all the cells: a run whose parent is killed, then an undisturbed one."""
    return matrix.after_all(killed)


def test_a_killed_parent_takes_all_with_it_and_leaves_whole_lines(after_all):
    """Nobody is left to write a last record; but the worker and W&B's service must not stay."""
    run_dir, (processes, temporary), _ = after_all
    assert processes == []
    assert [name for name in temporary if name.startswith("kvpipe")] == []
    phases = [json.loads(line)["phase"] for line in (run_dir / "records.jsonl").open()]
    assert phases == ["run_started", "wandb_init", "run_planned", "before"]
    (logged,) = run_dir.glob("wandb/*/*.wandb")
    assert wandb_file.read(logged)["config"]["experiment"] == "tiny"


def test_the_run_after_all_faults_passes_as_if_nothing_had_been(after_all):
    """So does each run in between: it ends as it should in the place of the one before it."""
    _, (_, left_before), run = after_all
    assert (run.exit_code, run.stderr, run.end["status"]) == (0, "", "passed")
    assert (run.survivors, run.temporary) == ([], left_before)


@pytest.mark.parametrize("name", ["the clock is set back"])
def test_the_times_of_a_run_do_not_follow_the_clock(name, matrix):
    """It goes back an hour whenever it is read, in both processes."""
    elapsed = [record["elapsed_s"] for record in matrix.run(name).records[1:]]
    assert elapsed[0] >= 0
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("name", ["the clock is set back"])
def test_no_step_has_more_resident_memory_than_its_process_had_at_its_peak(name, matrix):
    steps = matrix.run(name).records[1:-1]
    measured = [(step["memory"], step["peak"]) for step in steps if "memory" in step]
    assert len(measured) == 4
    for memory, peak in measured:
        within = peak["process_rss_bytes"] if peak else 0
        assert max(memory["process_rss_bytes"], within) <= memory["process_peak_rss_bytes"]


def test_ctrl_c_twice_waits_for_nothing(matrix):
    """W&B alone would have been given longer than the test waits for the end."""
    run = matrix.run("SIGINT twice")
    assert run.records[0]["config"]["tracking"]["finish_timeout_s"] > 2 * PATIENCE_S
    assert run.exit_code == 130


GIVEN = {
    "HF_TOKEN": TOKEN,
    "STORAGE_KEY": "k3y/with+signs=",
    "DB_PASSWORD": 'p4ss "word"',
    "DATABASE_URL": "postgres://me:w0rd-of-url@host/db",
}


def test_no_secret_that_a_run_was_given_is_in_anything_that_it_wrote(site, tmp_path):
    """They are in the environment and in .env; phases print them, record them and raise them."""
    env_file = tmp_path / ".env"
    env_file.write_text(f"WANDB_API_KEY={FAKE_KEY}\n")
    env_file.chmod(0o600)
    hows = ["phases.before.how=record_secrets", "phases.fault.how=print_secrets"]
    overrides = ["pipeline=without_engine", *hows, *ONLINE]
    with wandb_server.serve() as served:
        given = {"WANDB_API_KEY": "", **GIVEN}
        run = start(WITHOUT_ENGINE, overrides, site, tmp_path, served, **given)
        stdout, stderr = run.process.communicate(timeout=PATIENCE_S)
        asked = [body for _, body in served.requests]
    assert run.process.returncode == 3
    reported = "[redacted] and [redacted] and [redacted] and postgres://me:[redacted]@host/db"
    assert f"{reported} and [redacted]" in json.loads(stdout.splitlines()[-1])["error"]
    (log,) = tmp_path.glob("outputs/tiny/*/engine.log")
    assert f"a log with {reported}" in log.read_text()
    env_file.unlink()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path for path in written if path.suffix == ".wandb"]
    texts = [stdout.encode(), stderr.encode(), *map(str.encode, map(str, written)), *asked]
    for secret in (FAKE_KEY, TOKEN, "k3y/with+signs=", 'p4ss "word"', "w0rd-of-url"):
        for form in {secret, json.dumps(secret)[1:-1]}:
            found = [text for text in [*texts, *written.values()] if form.encode() in text]
            assert found == []


def test_a_run_in_one_process_records_the_failure_of_a_step_like_any_other(site, tmp_path):
    overrides = ["pipeline=without_engine", "phases.fault.how=exception"]
    overrides += ["runner.isolate=false", UNTRACKED]
    run = start(WITHOUT_ENGINE, overrides, site, tmp_path)
    stdout, _ = run.process.communicate(timeout=PATIENCE_S)
    records = [json.loads(line) for line in stdout.splitlines()]
    steps = ["wandb_init", "run_planned", "before", "fault", "cleaning"]
    assert [record["phase"] for record in records] == ["run_started", *steps, "run_finished"]
    end = records[-1]
    assert (run.process.returncode, end["exit_code"], end["failing_phase"]) == (3, 3, "fault")
    assert end["error"] == "step 'fault': ValueError: a fault of the tests"


@pytest.mark.parametrize("secret", ["prompt.text=hello {key}", "+phases.fault.hf_token={key}"])
def test_a_config_that_holds_a_secret_is_refused_and_not_kept(site, tmp_path, secret):
    overrides = ["pipeline=without_engine", secret.format(key=FAKE_KEY)]
    run = start(WITHOUT_ENGINE, overrides, site, tmp_path)
    stdout, stderr = run.process.communicate(timeout=PATIENCE_S)
    assert (run.process.returncode, stdout) == (2, "")
    assert FAKE_KEY not in stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file() and FAKE_KEY in p.read_text()] == []


@pytest.fixture
def little_memory(tmp_path):
    """A cgroup with less memory than a run that eats it; for cgroups of version 1."""
    group = Path("/sys/fs/cgroup/memory") / f"kvpipe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(400 << 20))
    except OSError as error:
        pytest.skip(f"no cgroup of its own: {error}")
    yield group
    group.rmdir()


def test_a_worker_that_linux_kills_for_its_memory_is_reported_as_out_of_memory(
    site, tmp_path, little_memory
):
    overrides = ["pipeline=without_engine", "phases.fault.how=eat_memory", "tracking=disabled"]
    run = start(WITHOUT_ENGINE, overrides, site, tmp_path)
    (little_memory / "cgroup.procs").write_text(str(run.process.pid))
    stdout, _ = run.process.communicate(timeout=PATIENCE_S)
    end = json.loads(stdout.splitlines()[-1])
    assert run.process.returncode == end["exit_code"] == 4
    assert end["failing_phase"] == "fault"
    assert "Linux killed it for lack of memory" in end["error"]
    assert survivors(tmp_path) == []
