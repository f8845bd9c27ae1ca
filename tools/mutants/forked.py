"""Processes of pytest without the seconds that it takes to import what each of them imports.

A server imports pytest and the packages of tests/conftest.py, and forks for each fault. It imports
nothing of the repository, whose modules each child takes from its own copy: it is this file, run as a
script. A test finds in a child what it finds after any start of pytest.
"""

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_POLL_S = 0.02
# Prints the modules that a process of pytest has imported before its first test.
_IMPORTED = """
import json, pytest, sys
pytest.main(["--help"])  # loads its plugins and conftest.py
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


def imported_by_pytest(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Return the modules, but those of a copy itself, that its pytest imports before the first test."""
    tree = folder / "tree"
    asked = subprocess.run(
        [str(folder / "venv/bin/python"), "-c", _IMPORTED],
        cwd=tree,
        env=dict(environment),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    files: dict[str, str | None] = json.loads(asked.stdout.splitlines()[-1])
    return [name for name, file in files.items() if file and str(tree) not in file]


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
    if order := _serve():
        _run(order)


if __name__ == "__main__":
    _main(sys.argv[1:])
