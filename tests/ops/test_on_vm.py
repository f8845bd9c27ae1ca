"""Effects of the operations on the VM: the key file, a run and its log, its directory, the set-up."""

import os
import pty
import re
import shutil
import stat
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.ops.conftest import VM, Laptop

KEY = """0123456789$HOME`id`'"\\ ab#c"""
RUN = VM | {"EXPERIMENT": "tiny", "RUN": "r1"}


def env_file(laptop: Laptop, index: int = 0) -> Path:
    return laptop.worker(index) / "kvpipe/.env"


def test_the_key_file_has_the_lines_as_they_were_given_and_only_its_owner_reads_it(
    vm: Laptop,
) -> None:
    lines = f"# keys\nWANDB_API_KEY={KEY}\n\nHF_TOKEN=x\n"
    done = vm.make("tpu-secrets", **VM, WORKER="all", stdin=lines)
    assert done.code == 0, done.err
    for index in (0, 1):
        assert env_file(vm, index).read_text() == lines
        assert stat.S_IMODE(env_file(vm, index).stat().st_mode) == 0o600


def test_no_process_command_line_or_output_has_the_key(vm: Laptop) -> None:
    """The fake gcloud looks through the arguments and environments of every process while it runs."""
    (vm.stand_in / "secret").write_text(KEY)
    done = vm.make("tpu-secrets", **VM, WORKER="all", stdin=f"WANDB_API_KEY={KEY}\n")
    assert done.code == 0, done.err
    assert [call["leaks"] for call in vm.calls] == [[], [], []]
    assert KEY not in done.out + done.err
    assert KEY not in (vm.stand_in / "calls.jsonl").read_text()


def test_the_fake_gcloud_would_find_a_key_in_a_command_line_and_in_an_environment(
    vm: Laptop,
) -> None:
    (vm.stand_in / "secret").write_text("a-key-to-be-found")
    holder = subprocess.Popen(["sh", "-c", "sleep 60", "a-key-to-be-found"])
    heir = subprocess.Popen(["sleep", "60"], env={"KEY": "a-key-to-be-found"})
    try:
        vm.make("tpu-ssh", **VM, COMMAND="true")
    finally:
        holder.kill()
        heir.kill()
    assert set(vm.calls[0]["leaks"]) >= {f"/proc/{holder.pid}/cmdline", f"/proc/{heir.pid}/environ"}


def test_a_key_in_the_callers_environment_is_not_handed_on(vm: Laptop) -> None:
    (vm.stand_in / "secret").write_text("sekrit-of-the-environment")
    os.environ["WANDB_API_KEY"] = "sekrit-of-the-environment"
    try:
        environment = vm.environment | {"WANDB_API_KEY": os.environ["WANDB_API_KEY"]}
    finally:
        del os.environ["WANDB_API_KEY"]
    done = subprocess.run(
        ["make", "tpu-ssh", *(f"{k}={v}" for k, v in VM.items()), "COMMAND=env"],
        cwd=vm.clone,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "PATH=" in done.stdout
    assert "WANDB_API_KEY" not in done.stdout


def test_at_a_terminal_the_key_is_asked_for_and_not_shown(vm: Laptop) -> None:
    ours, theirs = pty.openpty()
    make = subprocess.Popen(
        ["make", "tpu-secrets", *(f"{k}={v}" for k, v in VM.items())],
        cwd=vm.clone,
        env=vm.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"WANDB_API_KEY: " not in shown:
        shown += os.read(ours, 1000)
    deadline = time.monotonic() + 20
    while termios.tcgetattr(ours)[3] & termios.ECHO:  # it is turned off after the question
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.write(ours, b"typed-key\n")
    try:
        while piece := os.read(ours, 1000):
            shown += piece
    except OSError:
        pass  # Linux's way to say that the other end is closed
    assert make.wait(timeout=30) == 0, shown
    assert b"typed-key" not in shown
    assert env_file(vm).read_text() == "WANDB_API_KEY=typed-key\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "standard input is empty"),
        (f"A=b\n{KEY}\n", "standard input, line 2: it must be NAME=VALUE, a comment or empty"),
    ],
)
def test_what_is_no_key_file_is_refused_and_not_shown(vm: Laptop, lines: str, message: str) -> None:
    done = vm.make("tpu-secrets", **VM, stdin=lines)
    assert done.code != 0
    assert message in done.err
    assert KEY not in done.err
    assert not env_file(vm).exists()


def test_a_key_file_that_came_in_part_leaves_the_old_one(vm: Laptop) -> None:
    """gcloud repeats a command whose connection broke, when the input is used up already."""
    env_file(vm).write_text("OLD=1\n")
    clone = vm.worker(0) / "kvpipe"
    done = subprocess.run(
        [clone / "ops/on-vm", "secrets", "10"], input="", text=True, capture_output=True
    )
    assert done.returncode == 1
    assert re.search(r"received +0 bytes of the key file, not 10", done.stderr)
    assert env_file(vm).read_text() == "OLD=1\n"
    assert list(clone.glob(".env.*")) == []


@pytest.fixture
def may_end(vm: Laptop) -> Path:
    return vm.worker(0) / "kvpipe/may_end"


def test_a_run_outlives_the_connection_and_its_log_records_and_exit_code_are_kept(
    vm: Laptop, may_end: Path
) -> None:
    started = vm.make("tpu-run", **RUN)
    assert (started.code, started.out.splitlines()[-1]) == (0, "r1"), started.err
    run = vm.worker(0) / "kvpipe/outputs/r1"
    session, deadline = run / "session", time.monotonic() + 20
    while not (session.exists() and session.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    # A session of its own: what ends the connection's session does not reach it.
    pid = (run / "pid").read_text().strip()
    assert session.read_text().strip() == pid
    assert int(pid) != os.getsid(0)

    logs = vm.make("tpu-logs", **VM)
    assert (logs.code, logs.out.splitlines()[-1]) == (0, f"run r1: running, process {pid}")
    assert not (run / "exit_code").exists()
    may_end.touch()
    logs = vm.make("tpu-logs", **VM, FOLLOW="1")
    assert "Error 3" in logs.err
    assert logs.out.splitlines()[-1] == "run r1: ended, exit code 3"
    assert "python -m kvpipe +experiment=tiny" in logs.out
    assert (run / "exit_code").read_text() == "3\n"

    done = vm.make("tpu-fetch", **VM)
    assert (done.code, done.out) == (0, "outputs/r1/\n"), done.err
    fetched = vm.clone / "outputs/r1"
    assert {path.name for path in fetched.iterdir()} == {path.name for path in run.iterdir()}
    assert (fetched / "records.jsonl").read_bytes() == (run / "records.jsonl").read_bytes()
    assert (fetched / "log").read_bytes() == (run / "log").read_bytes()


def test_a_run_is_not_started_twice_when_gcloud_repeats_the_command(
    vm: Laptop, may_end: Path
) -> None:
    may_end.touch()
    vm.make("tpu-run", **RUN)
    vm.make("tpu-logs", **VM, FOLLOW="1")
    again = vm.make("tpu-run", **RUN)
    assert (again.code, again.out.splitlines()[0]) == (
        0,
        "run r1 is already started; nothing to do",
    )


@pytest.mark.parametrize(
    ("name", "rank"), [("t1v-n-1a2b3c4d-w-3", "3"), ("t1v-n-1a2b3c4d-w-x", "none"), ("vm", "none")]
)
def test_a_run_takes_its_rank_among_the_hosts_from_the_workers_name(
    vm: Laptop, may_end: Path, name: str, rank: str
) -> None:
    real = shutil.which("uname")
    uname = vm.stand_in / "bin/uname"
    uname.write_text(f'#!/bin/sh\n[ "$*" = -n ] || exec {real} "$@"\necho {name}\n')
    uname.chmod(0o755)
    may_end.touch()
    assert vm.make("tpu-run", **RUN).code == 0
    assert f"rank: {rank}" in vm.make("tpu-logs", **VM, FOLLOW="1").out.splitlines()


def test_a_run_has_a_name_of_its_own_with_the_time_and_the_experiment(
    vm: Laptop, may_end: Path
) -> None:
    may_end.touch()
    done = vm.make("tpu-run", **VM, EXPERIMENT="tiny")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_tiny", done.out.splitlines()[-1])


def test_a_run_that_was_killed_is_said_to_have_no_exit_code(vm: Laptop) -> None:
    run = vm.worker(0) / "kvpipe/outputs/r1"
    run.mkdir(parents=True)
    (run / "log").write_text("last words\n")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (run / "pid").write_text(f"{gone.pid}\n")
    logs = vm.make("tpu-logs", **VM, RUN="r1")
    assert logs.code != 0
    assert logs.out.startswith("last words\n")
    assert "ended without an exit code: it was killed, or the VM was restarted" in logs.out


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        ("tpu-logs", {}, "no run was started here; make tpu-run starts one"),
        ("tpu-fetch", {"RUN": "r9"}, "there is no run 'r9' in "),
        ("tpu-run", RUN, "there is no .venv here; make tpu-setup makes it"),
    ],
)
def test_what_is_not_there_on_the_vm_is_named(
    vm: Laptop, target: str, values: dict[str, str], message: str
) -> None:
    (vm.worker(0) / "kvpipe/.venv/bin/python").unlink()
    done = vm.make(target, **(VM | values))
    assert done.code != 0
    assert message in done.err


def test_the_workers_of_a_slice_are_fetched_side_by_side(vm: Laptop) -> None:
    for index in (0, 1):
        (vm.worker(index) / "kvpipe/may_end").touch()
    assert vm.make("tpu-run", **RUN, WORKER="all").code == 0
    vm.make("tpu-logs", **VM, WORKER="all", FOLLOW="1")
    done = vm.make("tpu-fetch", **VM, RUN="r1", WORKER="all", TO="got")
    assert done.code == 0, done.err
    for index in (0, 1):
        assert (vm.clone / f"got/worker-{index}/r1/exit_code").read_text() == "3\n"


def test_the_set_up_takes_the_locks_engine_or_one_from_git(vm: Laptop) -> None:
    clone = vm.worker(0) / "kvpipe"
    (clone / ".venv/.kvpipe-synced").touch()
    done = vm.make("tpu-setup", **VM)
    assert done.code == 0, done.err
    assert not (clone / ".venv/.kvpipe-synced").exists()
    assert "uv pip install" not in done.out
    done = vm.make("tpu-setup", **VM, ENGINE="bd09a87")
    assert done.code == 0, done.err
    assert (
        f"in /: uv pip install --upgrade-package flax --python {clone}/.venv/bin/python sglang-jax[tpu] @ "
        "git+https://github.com/sgl-project/sglang-jax@bd09a87#subdirectory=python\n"
    ) in done.out


def test_the_doctor_is_kvpipes_own(vm: Laptop) -> None:
    done = vm.make("tpu-doctor", **VM)
    assert (done.code, done.out) == (0, "python -m kvpipe doctor\n")
