"""Processes of pytest without the seconds that it takes to import what each of them imports.

A server imports pytest and the packages of tests/conftest.py, for tests of the engine also jax and
what sglang-jax imports, and forks for each fault. It imports nothing of the repository, nor the
engine, which the repository patches: each child takes these from its own copy. It is this file, run
as a script. A test finds in a child what it finds after any start of pytest.
"""

import gc
import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_POLL_S = 0.02
# A test that has one of these as a parameter imports jax, and so has each later one of its file.
_WITH_JAX = re.compile(r"\b(four_devices|start_engine|real_engine|engine: Any)\b")
# What jax reads when it is imported: the fixture four_devices sets it.
_OF_JAX = {"JAX_PLATFORMS": "cpu"}
# What a process of pytest imports before its first test: its plugins and conftest.py.
_PYTEST = """
import json, pytest, sys
pytest.main(["--help"])
"""
# What the first test of the engine imports besides.
_ENGINE = """
from kvpipe.engine import compat
compat.import_engine()
"""
_PRINT = """
print(json.dumps({name: getattr(module, "__file__", None) for name, module in sys.modules.items()}))
"""


@dataclass(frozen=True)
class Order:
    """A process of pytest.

    Attributes:
        server: the folder from which the server's interpreter was taken.
        folder: the copy's folder: its tree, its interpreter and its files.
        environment: its environment.
        output: file of what it prints.
        arguments: of pytest.
        limit_s: seconds after which it is killed; None if it may take any time.
    """

    server: str
    folder: str
    environment: Mapping[str, str]
    output: str
    arguments: Sequence[str]
    limit_s: float | None


class Server:
    """A server in the folder of a copy of the repository; it carries out one order at a time.

    Args:
        folder: of the copy.
        environment: the server's.
        imported: modules that it imports, as :func:`imported_by_pytest` returns them.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], imported: Sequence[str]
    ) -> None:
        self._folder = str(folder)
        self._process = subprocess.Popen(
            [str(folder / "venv/bin/python"), "-P", __file__, *imported],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(
        self,
        folder: Path,
        environment: Mapping[str, str],
        output: Path,
        arguments: Sequence[str],
        limit_s: float | None,
    ) -> tuple[int, float] | None:
        """Run pytest in a copy; return exit code and CPU seconds, None if it was killed."""
        order = Order(self._folder, str(folder), environment, str(output), list(arguments), limit_s)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(order)), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """End the server, which does nothing at this moment."""
        self._process.communicate()


class Servers:
    """Servers in the folder of a copy, each started when it is first needed.

    Args:
        folder: of the copy.
        environment: of the servers.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._imported: dict[bool, list[str]] = {}
        self._idle: defaultdict[bool, list[Server]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def one(self, tests: Sequence[str]) -> Iterator[Server]:
        """Yield a server for some tests; nobody else has it within the context."""
        with_jax = any(map(self._has_jax, tests))
        with self._lock:
            idle = self._idle[with_jax]
            server = idle.pop() if idle else self._start(with_jax)
        yield server
        with self._lock:
            idle.append(server)

    def end(self) -> None:
        """End all servers, of which none does anything at this moment."""
        for idle in self._idle.values():
            for server in idle:
                server.end()

    def _has_jax(self, test: str) -> bool:
        file = self._folder / "tree" / test.partition("::")[0]
        return bool(_WITH_JAX.search(file.read_text(encoding="utf-8")))

    def _start(self, with_jax: bool) -> Server:
        environment = {**self._environment, **(_OF_JAX if with_jax else {})}
        if with_jax not in self._imported:
            self._imported[with_jax] = imported_by_pytest(self._folder, environment, with_jax)
        return Server(self._folder, environment, self._imported[with_jax])


def imported_by_pytest(
    folder: Path, environment: Mapping[str, str], with_engine: bool = False
) -> list[str]:
    """Return the modules that the pytest of a copy imports before the first test.

    Without those of the copy and of sglang-jax.

    Args:
        folder: of the copy.
        environment: of its process.
        with_engine: whether the first test is one of the engine, and has imported it.
    """
    tree = folder / "tree"
    script = _PYTEST + (_ENGINE if with_engine else "") + _PRINT
    asked = subprocess.run(
        [str(folder / "venv/bin/python"), "-c", script],
        cwd=tree,
        env=dict(environment),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    files: dict[str, str | None] = json.loads(asked.stdout.splitlines()[-1])
    return [
        name
        for name, file in files.items()
        if file and str(tree) not in file and name.partition(".")[0] != "sgl_jax"
    ]


def waited(pid: int, limit_s: float | None) -> tuple[int, float] | None:
    """Wait for a child; return its exit code and CPU seconds, or None if it runs at the limit.

    The seconds include the processes that it waited for. Popen.wait() would discard them.
    """
    ends = time.monotonic() + (math.inf if limit_s is None else limit_s)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            return None
        time.sleep(_POLL_S)
    return os.waitstatus_to_exitcode(ended[1]), ended[2].ru_utime + ended[2].ru_stime


def kill(pid: int) -> None:
    """Kill a child and all that it has started."""
    child = psutil.Process(pid)
    started = child.children(recursive=True)
    child.kill()
    os.waitpid(pid, 0)
    for process in started:
        if process.is_running():
            process.kill()


def _serve() -> Order | None:
    """Carry out orders until there are no more; returns in a child with the order that is its own."""
    for line in sys.stdin:
        order = Order(**json.loads(line))
        if not (pid := os.fork()):
            return order
        ended = waited(pid, order.limit_s)
        if ended is None:
            kill(pid)
        print(json.dumps(ended), flush=True)
    return None


def _run(order: Order) -> None:
    """Run pytest in this process as a start of the copy's interpreter would; it never returns."""
    for descriptor, file, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(file, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    os.environ.clear()
    os.environ.update(order.environment)

    def own(path: str) -> str:
        return path.replace(order.server, order.folder, 1)

    os.chdir(tree := own(f"{order.server}/tree"))
    sys.path[:] = [tree, *map(own, sys.path)]
    for name in ("executable", "prefix", "exec_prefix"):
        setattr(sys, name, own(getattr(sys, name)))
    sys.argv[1:] = order.arguments
    sys.orig_argv[:] = [sys.executable, "-m", "pytest", *order.arguments]
    runpy.run_module("pytest", run_name="__main__", alter_sys=True)


def _main(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.freeze()  # a child's collections need not look through what it will not give up
    if order := _serve():
        _run(order)


if __name__ == "__main__":
    _main(sys.argv[1:])
