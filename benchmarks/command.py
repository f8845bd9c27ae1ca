"""Run the command as a user does, and measure the process with its children."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of the benchmarks' own process, or of jax's own cache: no part of the command.
_NOT_INHERITED = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")


@dataclass(frozen=True)
class Ran:
    """A command that succeeded: wall and CPU seconds, and the JSON lines that it printed."""

    seconds: float
    cpu_seconds: float
    records: Sequence[Mapping[str, Any]]

    def record(self, name: str) -> Mapping[str, Any]:
        """Return the first record of a phase or of this kind."""
        return next(record for record in self.records if record["phase"] == name)

    @property
    def phases(self) -> Sequence[Mapping[str, Any]]:
        """The records of phases."""
        return [record for record in self.records if "duration_s" in record]


class CommandFailed(RuntimeError):
    """A command that ended with another exit code than 0."""

    def __init__(self, exit_code: int, stderr: str) -> None:
        """Keep the exit code and the output of the command."""
        super().__init__(f"kvpipe ended with exit code {exit_code}:\n{stderr}")
        self.exit_code = exit_code


def kvpipe(cwd: str, *arguments: str) -> Ran:
    """Run ``python -m kvpipe`` in a directory that has its cache too.

    Raises:
        CommandFailed: it failed.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "kvpipe", *arguments, f"cache_dir={cwd}/cache"],
        cwd=cwd,
        env=inherited,
        capture_output=True,
        text=True,
    )
    seconds, after = time.monotonic() - began, os.times()
    if done.returncode:
        raise CommandFailed(done.returncode, done.stderr)
    user = after.children_user - before.children_user
    cpu_seconds = user + after.children_system - before.children_system
    return Ran(seconds, cpu_seconds, [json.loads(line) for line in done.stdout.splitlines()])
