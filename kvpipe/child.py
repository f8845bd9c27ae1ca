"""A child process that speaks JSON lines, both ends of it: the worker's and the planner's.

Jobs come in on its standard input. What it reports goes out on a pipe of its own, so that nothing
the engine prints can come between the lines; stdout and stderr are the engine's log.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

_LOG_TAIL_LINES = 8
_READ_BYTES = 1 << 16
_POLL_S = 0.01
# A child that has closed its pipe is on its way out.
_DYING_S = 10.0
STACKS_FILE = "stacks.txt"
_STACKS_S = 5.0
# One that is killed may have started another in the meantime.
_KILL_ROUNDS = 10

Wait = Callable[[int], None]


@dataclass(frozen=True)
class Child:
    """The parent's end.

    Attributes:
        process: the child, leader of a process group of its own.
        jobs: its standard input; the child takes the end of it for the parent's.
        reports: descriptor of the pipe on which it reports.
        log: where its stdout and stderr go.
        scratch: its directory for temporary files, which goes when it has ended.
    """

    process: subprocess.Popen[str]
    jobs: IO[str]
    reports: int
    log: Path
    scratch: Path

    def send(self, job: Mapping[str, Any]) -> None:
        """Give the child a job; one that has ended gets none, as its reports will show."""
        with suppress(BrokenPipeError):
            send(self.jobs, job)

    def end_jobs(self) -> None:
        """Tell the child that no job follows."""
        with suppress(BrokenPipeError):
            self.jobs.close()

    def lines(self, wait: Wait | None = None) -> Iterator[str]:
        """Yield the lines that the child sends until it closes the pipe; a torn last is left out.

        Args:
            wait: called with the pipe's descriptor, to return once there is something to read;
                whatever it raises loses no line.
        """
        pending = b""
        while True:
            if wait is not None:
                wait(self.reports)
            received = os.read(self.reports, _READ_BYTES)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            yield from (line.decode() for line in lines)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the child sends until it closes the pipe."""
        return map(json.loads, self.lines())

    def ended_by(self) -> int | None:
        """Return the exit code of the child, minus n if signal n ended it, once it has ended.

        None is for one that lives on. It is not reaped: until then its id is no other process's.
        """
        if self.process.returncode is not None:
            return self.process.returncode
        if not _ends_within(self.process, _DYING_S):
            return None
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def how_it_ended(self) -> str:
        """Say in words how the child ended."""
        code = self.ended_by()
        if code is None:
            return "closing its pipe without an exit"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def write_stacks(self) -> str:
        """Let the child write what each of its threads does; return it.

        It has to be one that does so (:mod:`kvpipe.worker_process`). The text is empty if it does
        not manage within seconds.
        """
        stacks = self.scratch / STACKS_FILE
        if not stacks.exists():
            return ""
        self.process.send_signal(signal.SIGUSR1)
        deadline, text = time.monotonic() + _STACKS_S, ""
        while time.monotonic() < deadline:
            time.sleep(10 * _POLL_S)
            before, text = text, stacks.read_text(errors="replace")
            if text and text == before:
                break
        return text

    def kill(self) -> None:
        """End the child, its process group, and what else it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # Those that have left the group, and may have lost their parent, still have its scratch.
        for _ in range(_KILL_ROUNDS):
            left = [p for p in psutil.process_iter() if self._is_stray(p)]
            if not left:
                return
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)

    def _is_stray(self, process: psutil.Process) -> bool:
        """Whether a process has the child's directory for temporary files; not the child itself."""
        return process.pid != self.process.pid and _temporary_of(process) == str(self.scratch)


def _temporary_of(process: psutil.Process) -> str | None:
    """Return the TMPDIR of a process; None for one that has ended or is another user's."""
    try:
        return process.environ().get("TMPDIR")
    except psutil.Error:
        return None


@contextmanager
def start_child(
    module: str, log: Path, environ: Mapping[str, str], shutdown_timeout_s: float
) -> Iterator[Child]:
    """Start ``python -m module FD``; at the end give it time to leave, then end its whole group.

    Args:
        module: what to run; it reports on descriptor FD.
        log: file for its stdout and stderr.
        environ: its environment; TMPDIR becomes a directory of its own, which goes at the end.
        shutdown_timeout_s: seconds that it may take to end once its input has ended.
    """
    read_fd, write_fd = os.pipe()
    scratch = Path(tempfile.mkdtemp(prefix="kvpipe-"))
    try:
        try:
            with log.open("w") as log_file:
                process = subprocess.Popen(
                    [sys.executable, "-m", module, str(write_fd)],
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    env=dict(environ) | {"TMPDIR": str(scratch)},
                    pass_fds=(write_fd,),
                    start_new_session=True,
                    text=True,
                    encoding="utf-8",
                )
        finally:
            os.close(write_fd)
        assert process.stdin is not None
        child = Child(process, process.stdin, read_fd, log, scratch)
        try:
            yield child
            child.end_jobs()
            _ends_within(process, shutdown_timeout_s)
        finally:
            child.kill()
            process.wait()
            child.end_jobs()
    finally:
        os.close(read_fd)
        remove_tree(scratch)


def remove_tree(directory: Path) -> None:
    """Remove a directory that parent and child may both be removing."""

    def unless_gone(function: Any, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    shutil.rmtree(directory, onexc=unless_gone)


def _ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    """Wait for the end of a process without reaping it; return whether it came."""
    deadline = time.monotonic() + seconds
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, flags) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def send(channel: IO[str], message: Mapping[str, Any]) -> None:
    """Write one JSON line and flush it."""
    channel.write(json.dumps(message, allow_nan=False) + "\n")
    channel.flush()
