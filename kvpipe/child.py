"""A child process that speaks JSON lines, both ends of it: the worker's and the planner's.

Jobs come in on its standard input. What it reports goes out on a pipe of its own, so that nothing
the engine prints can come between the lines; stdout and stderr are the engine's log.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_LOG_TAIL_LINES = 8


@dataclass(frozen=True)
class Child:
    """The parent's end.

    Attributes:
        process: the child, leader of a process group of its own.
        jobs: its standard input.
        reports: the pipe on which it reports.
        log: where its stdout and stderr go.
    """

    process: subprocess.Popen[str]
    jobs: IO[str]
    reports: IO[str]
    log: Path

    def send(self, job: Mapping[str, Any]) -> None:
        """Give the child a job; one that has ended gets none, as its reports will show."""
        with suppress(BrokenPipeError):
            send(self.jobs, job)

    def end_jobs(self) -> None:
        """Tell the child that no job follows."""
        with suppress(BrokenPipeError):
            self.jobs.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the child sends until it closes the pipe; a torn last line is left out."""
        for line in self.reports:
            if line.endswith("\n"):
                yield json.loads(line)

    def how_it_ended(self) -> str:
        """Wait for the end of the child and say in words how it ended."""
        code = self.process.wait()
        if code >= 0:
            return f"exit code {code}"
        hint = " (often the out-of-memory killer)" if -code == signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


@contextmanager
def start_child(
    module: str, log: Path, environ: Mapping[str, str], shutdown_timeout_s: float
) -> Iterator[Child]:
    """Start ``python -m module FD``; at the end give it time to leave, then end its whole group.

    Args:
        module: what to run; it reports on descriptor FD.
        log: file for its stdout and stderr.
        environ: its environment.
        shutdown_timeout_s: seconds that it may take to end once its input has ended.
    """
    read_fd, write_fd = os.pipe()
    with log.open("w") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environ,
            pass_fds=(write_fd,),
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
    os.close(write_fd)
    assert process.stdin is not None
    with os.fdopen(read_fd, encoding="utf-8") as reports:
        child = Child(process, process.stdin, reports, log)
        try:
            yield child
            child.end_jobs()
            process.wait(shutdown_timeout_s)
        finally:
            _kill_group(process)
            child.end_jobs()


def send(channel: IO[str], message: Mapping[str, Any]) -> None:
    """Write one JSON line and flush it."""
    channel.write(json.dumps(message, allow_nan=False) + "\n")
    channel.flush()


def _kill_group(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
