"""A laptop with a clone, its remote, and a TPU VM of two workers behind the fake gcloud."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers_config import ROOT

VM = {"TPU": "box", "PROJECT": "p-1", "ZONE": "us-x1-b", "HOSTKEY": "SHA256:abc+/9"}
ENV_SH = """#!/bin/sh
# Replaces the set-up, which needs an index.
if [ "${1:-}" = uv ]; then echo "$PWD/tools/uv"; exit; fi
mkdir -p .venv/bin
cp tools/python .venv/bin/python
echo made >>.venv/calls
"""
UV = """#!/bin/sh
echo "in $PWD: uv $*"
"""
PYTHON = """#!/bin/sh
# Replaces kvpipe in a run: it keeps a record, waits until it may end, and fails.
echo "python $*"
case "$*" in
    *hydra.run.dir=*)
        dir=$(printf '%s\\n' "$@" | sed -n 's/^hydra.run.dir=//p')
        for word in "$@"; do printf '<%s>' "$word"; done >"$dir/records.jsonl"
        echo "rank: ${KVPIPE_NODE_RANK:-none}"
        ps -o sid= -p $$ >"$dir/session"
        while [ ! -e may_end ]; do sleep 0.05; done
        exit 3
        ;;
esac
"""


def git(cwd: Path, *arguments: str) -> str:
    options = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", *options, *arguments], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def printed(self) -> list[list[str]]:
        """The commands that were announced, as a shell reads them."""
        lines = "\n" + self.err
        return [shlex.split(part) for part in _commands(lines)]


def _commands(text: str) -> list[str]:
    """Return what follows each ``+`` at the beginning of a line, quoted newlines included."""
    parts = text.split("\n+ ")[1:]
    found = []
    for part in parts:
        lines = part.split("\n")
        command = lines.pop(0)
        while True:
            try:
                shlex.split(command)
                break
            except ValueError:
                command += "\n" + lines.pop(0)
        found.append(command)
    return found


@dataclass(frozen=True)
class Laptop:
    clone: Path
    stand_in: Path

    def make(self, target: str, *, stdin: object = subprocess.DEVNULL, **values: str) -> Done:
        done = subprocess.run(
            ["make", target, *(f"{k}={v}" for k, v in values.items())],
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            **({"input": stdin} if isinstance(stdin, str) else {"stdin": stdin}),
        )
        return Done(done.returncode, done.stdout, done.stderr)

    @property
    def environment(self) -> dict[str, str]:
        taken = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
        path = f"{self.stand_in / 'bin'}:{os.environ['PATH']}"
        return {**taken, "PATH": path, "STAND_IN": str(self.stand_in)}

    @property
    def calls(self) -> list[dict[str, list[str]]]:
        path = self.stand_in / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def argvs(self) -> list[list[str]]:
        return [["gcloud", *call["argv"]] for call in self.calls]

    def worker(self, index: int) -> Path:
        return self.stand_in / f"worker-{index}"


@pytest.fixture
def laptop(tmp_path: Path) -> Laptop:
    """Nothing is on the VM yet."""
    stand_in = tmp_path / "cloud"
    for name in ("bin", "worker-0", "worker-1"):
        (stand_in / name).mkdir(parents=True)
    gcloud = stand_in / "bin/gcloud"
    gcloud.write_text(f"#!{sys.executable}\n" + (ROOT / "tests/ops/gcloud.py").read_text())
    gcloud.chmod(0o755)
    (stand_in / "state").write_text("READY\tv4-8\tHEALTHY")

    clone = tmp_path / "my laptop/kvpipe"
    shutil.copytree(ROOT / "ops", clone / "ops")
    shutil.copy(ROOT / "Makefile", clone)
    shutil.copy(ROOT / ".gitignore", clone)
    for name, text in (
        (".ci/env.sh", ENV_SH),
        ("tools/uv", UV),
        ("tools/python", PYTHON),
    ):
        path = clone / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git(clone, "init", "--quiet")
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "-m", "first")
    git(clone, "remote", "add", "origin", str(tmp_path / "origin.git"))
    git(clone, "push", "--quiet", "origin", "main")
    return Laptop(clone, stand_in)


@pytest.fixture
def vm(laptop: Laptop) -> Laptop:
    """Both workers have the clone and the environment."""
    for index in (0, 1):
        clone = laptop.worker(index) / "kvpipe"
        git(
            laptop.worker(index),
            "clone",
            "--quiet",
            git(laptop.clone, "remote", "get-url", "origin"),
            "kvpipe",
        )
        subprocess.run([clone / ".ci/env.sh"], cwd=clone, check=True)
    return laptop
