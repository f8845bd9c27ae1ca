"""A real SLURM of one node, as child processes of the tests: no systemd, no accounting, no root.

All that it writes lies in one directory, its MUNGE key and socket too, and its ports are free ones,
so that it gets in no other cluster's way. The node has one TPU as a resource that is only counted:
whoever asks for it waits for whoever has it.
"""

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.command import INHERITED

# Debian installs the daemons where a user's PATH does not look.
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")
_PR_SET_PDEATHSIG = 1
_START_S = 30.0
_END_S = 10.0

_SLURM_CONF = """\
ClusterName=kvpipe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait_s}
MessageTimeout=60
SlurmdTimeout=0
GresTypes=tpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=tpu:1
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return what a cluster would need and this machine does not have."""
    return [name for name in _COMMANDS if shutil.which(name, path=_PATH) is None]


class Queued(NamedTuple):
    """A job in the queue: its id, name and state, and why it waits if it does."""

    job_id: str
    name: str
    state: str
    reason: str


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Attributes:
        folder: where it writes.
    """

    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables with which a client finds the cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def ask(self, *command: str) -> str:
        """Run one of SLURM's commands and return what it prints."""
        return subprocess.run(
            command, env=INHERITED | self.environ, check=True, capture_output=True, text=True
        ).stdout

    def cancel_all(self) -> None:
        """Cancel every job; one may end by itself between the look and the cancel."""
        while jobs := self.queue():
            done = subprocess.run(
                ["scancel", *(job.job_id for job in jobs)],
                env=INHERITED | self.environ,
                check=False,
            )
            if done.returncode == 0:
                return

    def queue(self, name: str | None = None) -> list[Queued]:
        """Return the jobs that have not ended, of this name or all; those of an array one by one."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%i|%j|%T|%r").splitlines()
        jobs = [Queued(*line.split("|")) for line in lines]
        return [job for job in jobs if name in (None, job.name)]


@contextmanager
def start(folder: Path, cpus: int, memory_mb: int, kill_wait_s: int = 10) -> Iterator[Cluster]:
    """Start a cluster in an empty directory and end it.

    Args:
        folder: its directory; a short path, because a socket's may have 107 characters.
        cpus: processors that the node says it has, whatever there are.
        memory_mb: memory that it says it has, in MiB.
        kill_wait_s: seconds between SIGTERM and SIGKILL when a job is cancelled.
    """
    cluster = Cluster(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    values = {
        "host": socket.gethostname().partition(".")[0],
        "controller_port": _free_port(),
        "node_port": _free_port(),
        "user": pwd.getpwuid(os.getuid()).pw_name,
        "folder": folder,
        "cpus": cpus,
        "memory_mb": memory_mb,
        "kill_wait_s": kill_wait_s,
    }
    (folder / "slurm.conf").write_text(_SLURM_CONF.format(**values))
    (folder / "gres.conf").write_text("Name=tpu Count=1\n")
    with ExitStack() as daemons:
        for command, is_up in (
            (_munged(folder), (folder / "munge.socket").exists),
            (["slurmctld", "-D"], lambda: _says(cluster, "UP", "scontrol", "ping")),
            (["slurmd", "-D"], lambda: _says(cluster, "idle", "sinfo", "--format=%T")),
        ):
            daemon = daemons.enter_context(_daemon(command, cluster))
            _wait_until_up(is_up, daemon, command[0], folder)
        try:
            yield cluster
        finally:
            cluster.cancel_all()
            _wait_for(lambda: not cluster.queue(), kill_wait_s + _END_S)


def _munged(folder: Path) -> list[str]:
    # Forced, because it does not like a directory that is for one user alone.
    files = [
        f"--{option}={folder}/munge.{end}"
        for option, end in (
            ("key-file", "key"),
            ("log-file", "log"),
            ("pid-file", "pid"),
            ("seed-file", "seed"),
            ("socket", "socket"),
        )
    ]
    return ["munged", "--foreground", "--force", *files]


@contextmanager
def _daemon(command: Sequence[str], cluster: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon in the foreground, with its log in the cluster's directory, until the end."""
    program = shutil.which(command[0], path=_PATH)
    assert program is not None, f"{command[0]} is not installed"
    with (cluster.folder / f"{command[0]}.log").open("wb") as log:
        daemon = subprocess.Popen(
            [program, *command[1:]],
            cwd=cluster.folder,
            env=INHERITED | cluster.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        yield daemon
    finally:
        daemon.terminate()
        try:
            daemon.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def _end_with_parent() -> None:
    """Have Linux end this process when the tests are killed, which then end nothing themselves."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _says(cluster: Cluster, word: str, *command: str) -> bool:
    """Return whether a command can be run by now, and prints this word."""
    try:
        return word in cluster.ask(*command).split()
    except subprocess.CalledProcessError:
        return False


def _wait_until_up(
    is_up: Callable[[], bool], daemon: subprocess.Popen[bytes], name: str, folder: Path
) -> None:
    def has_ended() -> bool:
        return daemon.poll() is not None

    if not _wait_for(lambda: has_ended() or is_up(), _START_S) or has_ended():
        log = (folder / f"{name}.log").read_text(errors="replace")
        raise RuntimeError(f"{name} did not start; its log:\n{log}")


def _wait_for(is_so: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
