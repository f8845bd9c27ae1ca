"""Run kvpipe as a user does: the command in a process of its own, and what it left.

The environment is read once, when tests are collected: pytest sets a variable for each test, so a
thread that copies the live environment may find a variable gone while it looks.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INHERITED = dict(os.environ)
# Without the platform that a shell or a fixture has chosen for jax: a run chooses its own.
WITHOUT_JAX = {k: v for k, v in INHERITED.items() if k != "JAX_PLATFORMS"}
FAKE_KEY = "0123456789abcdef" * 2 + "deadbeef"
KVPIPE = (sys.executable, "-m", "kvpipe")


@dataclass(frozen=True)
class Finished:
    """A command that has ended, and what it left.

    Attributes:
        exit_code: what it ended with.
        stdout: what it printed; of a run that writes into a pipe, a JSON line for each record.
        stderr: its messages.
        cwd: where it was called.
    """

    exit_code: int
    stdout: str
    stderr: str
    cwd: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The records that it printed."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def end(self) -> dict[str, Any]:
        """The last record that it printed."""
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def run_dir(self) -> Path:
        """The directory that the last record names."""
        return Path(self.end["run_dir"])

    def phase(self, name: str) -> dict[str, Any]:
        """Return the first record of a phase."""
        return next(line for line in self.lines if line["phase"] == name)

    def samples(self, step: str) -> list[dict[str, Any]]:
        """Return the samples that a step has written, or the rewards of them."""
        text = (self.run_dir / f"rollouts/{step}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


def programs(record: dict[str, Any]) -> int:
    """Return the programs that a phase needed anew, compiled or loaded from an earlier test's."""
    return record["compilations"] + record["programs_loaded"]


def kvpipe(
    cwd: Path,
    *arguments: str,
    site: Path | None = None,
    timeout_s: float = 600,
    **variables: str,
) -> Finished:
    """Run ``python -m kvpipe`` with arguments and wait for its end.

    Args:
        cwd: where it is called; its cache lies there too.
        arguments: verb, options and overrides.
        site: a folder whose ``kvpipe``, ``conf`` and ``phases`` come before the repository's.
        timeout_s: seconds after which the test fails.
        variables: more of the environment.
    """
    done = subprocess.run(
        [*KVPIPE, *arguments],
        cwd=cwd,
        env=environment(cwd, site) | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr, cwd)


def environment(cwd: Path, site: Path | None = None) -> dict[str, str]:
    """Return the environment of a command: a key that is none, and a cache below ``cwd``."""
    extra = {"WANDB_API_KEY": FAKE_KEY, "XDG_CACHE_HOME": str(cwd / "cache")}
    return WITHOUT_JAX | extra | ({"PYTHONPATH": str(site)} if site else {})
