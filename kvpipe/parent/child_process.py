"""A child process that speaks JSON lines, both ends: used for the worker and the planner.

Jobs arrive on its standard input. It reports on a separate pipe, so that the engine's output cannot
interleave with the lines; stdout and stderr are the engine's log.
"""

import json
import os
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

from kvpipe.system.pipes import STACKS_FILE, remove_tree, send

_LOG_TAIL_LINES = 8
# XLA writes long lines about preferences of its compiler for each program that a CPU loads.
_LOG_NOISE = "cpu_aot_loader.cc"
# Of the child's log, so that it takes any text, whatever the encoding of this process's streams.
_LOG_ENCODING = "utf-8:backslashreplace"
_READ_BYTES = 1 << 16
_POLL_S = 0.01
# A child that has closed its pipe is about to exit.
_DYING_S = 10.0
_STACKS_S = 5.0
# A killed process may have started another one in the meantime.
_KILL_ROUNDS = 10

Wait = Callable[[int], None]


@dataclass(frozen=True)
class Child:
    """The parent's end.

    Attributes:
        process: the child, leader of its own process group.
        jobs: its standard input; its end of file means that the parent has ended.
        reports: descriptor of the pipe on which it reports.
        log: file of its stdout and stderr.
        scratch: its directory for temporary files, removed after it has ended.
    """

    process: subprocess.Popen[str]
    jobs: IO[str]
    reports: int
    log: Path
    scratch: Path

    def send(self, job: Mapping[str, Any]) -> None:
        """Send the child a job; do nothing if it has ended, which its reports will show."""
        with suppress(BrokenPipeError):
            send(self.jobs, job)

    def end_jobs(self) -> None:
        """Close the child's input: no job follows."""
        with suppress(BrokenPipeError):
            self.jobs.close()

    def lines(self, wait: Wait | None = None) -> Iterator[str]:
        """Yield the child's lines until it closes the pipe, except an incomplete last one.

        ``wait`` is called with the pipe's descriptor, to block until it is readable; an exception
        from it loses no line.
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

    def messages(self, wait: Wait | None = None) -> Iterator[dict[str, Any]]:
        """Yield the messages that the child sends, as :meth:`lines` does."""
        return map(json.loads, self.lines(wait))

    def ended_by(self) -> int | None:
        """Return the child's exit code, or -n if signal n ended it; None while it runs.

        The child is not reaped, so its process id stays reserved.
        """
        if self.process.returncode is not None:
            return self.process.returncode
        if not _ends_within(self.process, _DYING_S):
            return None
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def how_it_ended(self) -> str:
        """Describe how the child ended."""
        code = self.ended_by()
        if code is None:
            return "closing its pipe without an exit"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        lines = [line for line in self.log_text().splitlines() if _LOG_NOISE not in line]
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def log_text(self) -> str:
        """Return its log; a note in its place if somebody has removed it during the run."""
        try:
            return self.log.read_text("utf-8", "replace")
        except FileNotFoundError:
            return "(somebody has removed the log)"

    def write_stacks(self) -> str:
        """Make the child write the stacks of its threads; return them.

        The child must support it (:mod:`kvpipe.worker.entry`). The text is empty if the child
        does not respond within seconds.
        """
        stacks = self.scratch / STACKS_FILE
        if not stacks.exists():
            return ""
        self.process.send_signal(signal.SIGUSR1)
        deadline, text = time.monotonic() + _STACKS_S, ""
        while time.monotonic() < deadline:
            time.sleep(10 * _POLL_S)
            before, text = text, stacks.read_text("utf-8", "replace")
            if text and text == before:
                break
        return text

    def kill(self) -> None:
        """Kill the child, its process group, and any other process that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # Processes that left the group and lost their parent still have its scratch directory as
        # TMPDIR.
        for _ in range(_KILL_ROUNDS):
            left = [p for p in psutil.process_iter() if self._is_stray(p)]
            if not left:
                return
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)

    def _is_stray(self, process: psutil.Process) -> bool:
        """Whether a process other than the child has the child's scratch directory as TMPDIR."""
        try:
            temporary = process.environ().get("TMPDIR")
        except psutil.Error:  # it has ended, or belongs to another user
            return False
        return process.pid != self.process.pid and temporary == str(self.scratch)


@contextmanager
def start_child(
    module: str, log: Path, environ: Mapping[str, str], shutdown_timeout_s: float
) -> Iterator[Child]:
    """Start ``python -m module FD``; on exit let it finish, then kill its whole process group.

    It reports on the descriptor FD; ``log`` is for its stdout and stderr. TMPDIR in its environment
    is a new directory, removed at the end. Once its input is closed it has ``shutdown_timeout_s``
    to exit.
    """
    read_fd, write_fd = os.pipe()
    scratch = Path(tempfile.mkdtemp(prefix="kvpipe-"))
    try:
        try:
            with log.open("w") as log_file:
                process = subprocess.Popen(
                    [sys.executable, *_path_flags(), "-m", module, str(write_fd)],
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    env=dict(environ) | {"TMPDIR": str(scratch), "PYTHONIOENCODING": _LOG_ENCODING},
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


def _path_flags() -> list[str]:
    """Return the flag that keeps the working directory off the child's path, if it is not on ours.

    ``-m`` would put it first, and a ``random.py`` that lies there would be imported.
    """
    return [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]


def _ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    """Wait for a process to end without reaping it; return whether it ended in time."""
    deadline = time.monotonic() + seconds
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, flags) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
