"""Runs of the real command that something happens to, and what must hold after each of them.

A :class:`Matrix` carries them out in one place, one after the other: each is the next run of the
one before it, which it shows to have left nothing that disturbs.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests import faults
from tests.command import FAKE_KEY, WITHOUT_JAX
from tests.sinks import wandb_file, wandb_server

TOKEN = "hf_" + "0Secret9" * 5
MARK = "KVPIPE_TEST_CELL"
PATIENCE_S = 240
UNTRACKED = "tracking=disabled"
GO_ON = ("runner.on_error=continue",)
# What fails here is a sink: the phase itself, and its record, are as they should be.
PASSED_ITSELF = ("W&B did not take", "No space left", "<stdout>", "records.jsonl was moved")
KVPIPE, WITHOUT_ENGINE = "kvpipe", "tests.without_engine"
"""Commands: the user's, and the same with a worker that has no engine."""


@dataclass(frozen=True)
class Cell:
    """A fault that happens to a run, and how the run must end.

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
        rows_lost: whether W&B may miss the last rows, and cannot know how the run ended.
        respond: how the W&B server answers; none is there without it.
        disk_bytes: size of a disk for the run directory alone.
        variables: more of the environment.
        finds: the fault that no test of the first tier would find, for a cell of the second.
    """

    exit_code: int
    error: str
    how: str = "nothing"
    kind: str = "changes"
    pipeline: str = "without_engine"
    overrides: tuple[str, ...] = ()
    act: Callable[["Running"], None] | None = None
    failing: str | None = "fault"
    cleaned: bool = False
    rows_lost: bool = False
    respond: Callable | None = None
    disk_bytes: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    finds: str | None = None

    @property
    def command(self):
        """The command that runs it."""
        return KVPIPE if "jax_ready" in faults.PIPELINES[self.pipeline] else WITHOUT_ENGINE

    @property
    def tracked(self):
        """Whether W&B receives it."""
        return UNTRACKED not in self.overrides

    @property
    def arguments(self):
        """Its overrides."""
        return [
            f"pipeline={self.pipeline}",
            *([f"phases.fault.how={self.how}"] if self.how != "nothing" else []),
            *([f"phases.fault.use=fault_{self.kind}"] if self.kind != "changes" else []),
            *self.overrides,
        ]

    @property
    def phases(self):
        """The records of a run that ended like this."""
        pipeline = faults.PIPELINES[self.pipeline]
        if self.failing is None or (self.overrides == GO_ON and self.kind == "measures"):
            done = pipeline
        elif self.failing == "run_planned":
            return ["run_started", "wandb_init", "run_finished"]
        else:
            done = pipeline[: pipeline.index(self.failing) + 1] + ["cleaning"] * self.cleaned
        if done[1:]:
            done = done[:1] + ["run_planned"] * (done[1] != "fault_parent") + done[1:]
        return ["run_started", *done, "run_finished"]


def names_of(cells: Mapping[str, Cell]):
    """The cells' names as parameters of a test, those of the second tier marked."""
    return [
        pytest.param(name, marks=pytest.mark.nightly(finds=cell.finds) if cell.finds else ())
        for name, cell in cells.items()
    ]


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

    def interrupt(self, signum):
        """Send a signal to the parent, once its worker waits."""
        self.worker()
        self.process.send_signal(signum)

    def signal_worker(self, signum):
        """Send a signal to the worker, once it waits."""
        os.kill(self.worker(), signum)

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
    """Output of a run."""

    exit_code: int
    stdout: str
    stderr: str
    run_dir: Path
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


class Matrix:
    """The cells that tests ask for, and the place in which a thread does one after the other.

    A cell with a disk of its own has a place of its own: the disk would hide what is there.
    """

    def __init__(self, request, tmp_path_factory):
        self.cells = request.module.CELLS
        self.site = tmp_path_factory.mktemp("site")
        self.place = tmp_path_factory.mktemp("place")
        faults.write_site(self.site)
        self._thread = ThreadPoolExecutor(1)
        self._runs = {}
        for name in _asked(request):
            cell = self.cells[name]
            place = tmp_path_factory.mktemp("disk") if cell.disk_bytes else self.place
            self._runs[name] = self._thread.submit(carry_out, cell, self.site, place)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._thread.shutdown(cancel_futures=True)

    def run(self, name):
        """The run of a cell; skips a test if it was not asked for."""
        if name not in self._runs:
            pytest.skip(f"the cell {name!r} was not asked for")
        return self._runs[name].result()

    def after_all(self, act):
        """Call ``act`` with the site and the place, after all the cells; return the result."""
        return self._thread.submit(act, self.site, self.place).result()

    def check_end(self, name):
        """Its exit code is right, and its last record truthful."""
        cell, run = self.cells[name], self.run(name)
        assert run.exit_code == cell.exit_code, run.stdout + run.stderr
        end = run.end
        assert (end["phase"], end["exit_code"]) == ("run_finished", cell.exit_code)
        assert end["status"] == ("interrupted" if cell.exit_code > 128 else "failed")
        assert cell.error in end["error"]
        assert end["failing_phase"] == cell.failing
        assert end["command"].startswith("python -m kvpipe --config-dir ")
        assert f"pipeline={cell.pipeline}" in end["command"]
        assert "Traceback" not in run.stderr or cell.pipeline == "in_the_parent"

    def check_records(self, name):
        """Every record before the failure, and that of the failing phase, are there."""
        cell, run = self.cells[name], self.run(name)
        assert [record["phase"] for record in run.records] == cell.phases
        if run.stdout:
            assert [json.loads(line) for line in run.stdout.splitlines()] == run.records
        if cell.failing not in (None, "run_planned") and not cell.error.startswith(PASSED_ITSELF):
            failed = [check for check in run.record(cell.failing)["checks"] if not check["passed"]]
            assert len(failed) == 1
            assert run.end["checks"].count(failed[0]) == 1

    def check_machine(self, name):
        """Nothing of the run is left on the machine."""
        run = self.run(name)
        assert run.survivors == []
        assert run.temporary == []
        assert not [path for path in run.run_dir.iterdir() if path.name.startswith(".reserve")]

    def check_wandb(self, name):
        """W&B's offline file is whole, and has the rows and the end of the run."""
        cell, run = self.cells[name], self.run(name)
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
            if not cell.rows_lost:
                rows = [row["phase/name"] for row in logged["history"] if "phase/name" in row]
                assert rows == [p for p in cell.phases if not p.startswith("run_")]
                ended = cell.exit_code if cell.failing else 0
                assert logged["summary"]["run/exit_code"] == ended


def _asked(request):
    """The names of the cells that tests of this module ask for, each once."""
    items = [item for item in request.session.items if item.fspath == request.fspath]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return dict.fromkeys(param["name"] for param in params if "name" in param)


def carry_out(cell, site, cwd):
    """Do what the cell says, and look at what is left on the machine."""
    (cwd / "worker.pid").unlink(missing_ok=True)
    with disk(cwd / "outputs", cell.disk_bytes), server(cell.respond) as served:
        running = start(cell.command, cell.arguments, site, cwd, served, **cell.variables)
        if cell.act:
            cell.act(running)
        stdout, stderr = running.process.communicate(timeout=PATIENCE_S)
        if cell.disk_bytes:
            subprocess.run(["cp", "-a", cwd / "outputs", cwd / "kept"], check=True)
    if cell.disk_bytes:
        (cwd / "outputs").rmdir()
        (cwd / "kept").rename(cwd / "outputs")
    ended = Ended(running.process.returncode, stdout, stderr, running.run_dir)
    ended.survivors = survivors(cwd)
    ended.temporary = [path.name for path in (cwd / "tmp").iterdir()]
    return ended


def start(command, overrides, site, cwd, served=None, **more):
    """Start a command with overrides; its temporary files are in ``cwd/tmp``."""
    (cwd / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", command, "--config-dir", str(site / "mine"), *overrides],
        cwd=cwd,
        env=environment(cwd, site, served) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Running(process, cwd, served)


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
    """Processes of a run that are still alive some time after its end."""
    deadline = time.monotonic() + 30
    while True:
        found = [p for p in psutil.process_iter() if environ_of(p).get(MARK) == str(cwd)]
        if not found or time.monotonic() > deadline:
            return [" ".join(process.cmdline()) for process in found]
        time.sleep(0.1)


def environ_of(process):
    try:
        return process.environ()
    except psutil.Error:
        return {}
