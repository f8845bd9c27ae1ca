"""Copies of the repository in which tests and runs import the copy, wherever they start processes."""

import os
import shlex
import shutil
import subprocess
import sysconfig
import venv
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvpipe.errors import DEFECT, InputError
from kvpipe.records.run import RECORDS_FILE, RunFinished
from kvpipe.report.run import read_run
from tools.mutants import forked

# Most of LLVM's passes take longer than they save in a program that runs for milliseconds. Without
# any, a token takes four times as long.
FEW_OPTIMIZATIONS = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
TESTS_FAILED = 1  # pytest's exit code
_KILLED = -9


@dataclass(frozen=True)
class Answer:
    """Result of tests or of a run in a copy.

    Attributes:
        noticed_by: what failed: the first failing test, or the step and checks of a run.
        problem: why the answer proves nothing: nothing was tested, or it did not end.
        cpu_s: CPU time of the process and of all that it waited for.
    """

    noticed_by: str = ""
    problem: str = ""
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Copy:
    """A copy of the repository's tracked files.

    Attributes:
        folder: holds the copy in ``tree``, its interpreter, and the files that its processes write.
        environment: environment of its processes.
        limit_s: seconds after which a process of it is killed; None if it may take any time.
    """

    folder: Path
    environment: Mapping[str, str]
    limit_s: float | None = None

    @property
    def tree(self) -> Path:
        """The copied repository."""
        return self.folder / "tree"

    @classmethod
    def of(cls, root: Path, folder: Path) -> "Copy":
        """Copy the tracked files of ``root`` as they are in its work tree."""
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
        )
        copy = cls(folder, _environment(folder))
        _make_interpreter(folder)
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                target = copy.tree / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target)
        return copy

    def again(self, folder: Path, limit_s: float | None = None) -> "Copy":
        """Return another copy of the tree, with the bytecode that this one has so far.

        The files are links: who changes one has to replace it, as Python replaces bytecode.
        """
        programs = self.environment["JAX_COMPILATION_CACHE_DIR"]
        environment = _environment(folder) | {"JAX_COMPILATION_CACHE_DIR": programs}
        shutil.copytree(self.tree, folder / "tree", copy_function=os.link)
        _make_interpreter(folder)
        return Copy(folder, environment, limit_s)

    def compile(self, packages: Sequence[str]) -> None:
        """Write the bytecode that the processes of copies would each write again.

        Args:
            packages: folders of modules; those that are not there are left out.
        """
        there = [package for package in packages if (self.tree / package).is_dir()]
        if there:
            self._python(self.tree, "-m", "compileall", "-q", *there)

    def compile_tests(self, tests: Sequence[str]) -> None:
        """Write the bytecode of tests, whose assertions pytest compiles in its own way.

        Args:
            tests: files and node ids.
        """
        if tests:
            self._pytest(["--collect-only", "-q", "-p", "no:cacheprovider", *tests])

    def test(
        self, tests: Sequence[str], *options: str, server: forked.Server | None = None
    ) -> Answer:
        """Run tests in the copy.

        Args:
            tests: files and node ids.
            options: further options of pytest.
            server: forks the process; without it the process is started as any other.
        """
        report = self.folder / "tests.xml"
        always = (
            "-q",
            "--hypothesis-profile=ci",  # the same examples each time, and no limit of seconds
            f"--basetemp={self.folder / 'tmp'}",
            f"--junitxml={report}",
            *("-p", "no:cacheprovider"),
        )
        arguments = (*always, *options, *tests)
        ended = self._forked(server, arguments) if server else self._pytest(arguments)
        if ended.code == TESTS_FAILED:
            return Answer(noticed_by=", ".join(_failed(report)), cpu_s=ended.cpu_s)
        return Answer(problem=f"pytest: {ended.said}" if ended.code else "", cpu_s=ended.cpu_s)

    def run(self, arguments: str) -> Answer:
        """Run kvpipe from the copy, in another directory.

        Args:
            arguments: of the command, as a shell takes them.
        """
        cwd = self.folder / "run"
        cwd.mkdir(exist_ok=True)
        ended = self._python(cwd, "-m", "kvpipe", *shlex.split(arguments))
        if not ended.code:
            return Answer(cpu_s=ended.cpu_s)
        if ended.code == DEFECT:  # as a name that the product no longer has
            return Answer(problem=f"the fault itself is broken: {ended.said}", cpu_s=ended.cpu_s)
        if (last := _last_record(cwd)) is None:
            return Answer(problem=f"the run left no last record: {ended.said}", cpu_s=ended.cpu_s)
        failed = dict.fromkeys(check.name for check in last.checks if not check.passed)
        why = ", ".join(failed) or last.error
        return Answer(f"run: {last.failing_phase or last.status}: {why}", cpu_s=ended.cpu_s)

    def imports_own(self, package: str) -> bool:
        """Whether processes in other directories import a package from the copy."""
        where = f"import {package}; print({package}.__path__[0])"
        ended = self._python(self.folder, "-c", where)
        return (ended.code, ended.said) == (0, str(self.tree / package))

    def _pytest(self, arguments: Sequence[str]) -> "_Ended":
        return self._python(self.tree, "-m", "pytest", *arguments)

    def _forked(self, server: forked.Server, arguments: Sequence[str]) -> "_Ended":
        output = self.folder / "output"
        return self._ended(
            server.pytest(self.folder, self.environment, output, arguments, self.limit_s)
        )

    def _python(self, cwd: Path, *arguments: str) -> "_Ended":
        with (self.folder / "output").open("w") as output:
            process = subprocess.Popen(
                [str(self.folder / "venv/bin/python"), *arguments],
                cwd=cwd,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            ended = forked.waited(process.pid, self.limit_s)
            if ended is None:
                forked.kill(process.pid)
            process.returncode = ended[0] if ended else _KILLED
        return self._ended(ended)

    def _ended(self, ended: Sequence[float] | None) -> "_Ended":
        """Return how a process of the copy ended, given exit code and CPU seconds, if it did."""
        if ended is None:
            return _Ended(_KILLED, f"it did not end within {self.limit_s:g} s")
        text = (self.folder / "output").read_text("utf-8", errors="replace")
        code, cpu_s = ended
        said = [line for line in text.split("\n") if line.strip()]
        last = said[-1] if said else f"exit code {code:g} without a word"
        return _Ended(int(code), last, cpu_s)


@dataclass(frozen=True)
class _Ended:
    """End of a process: exit code, last line, and CPU seconds unless it was killed."""

    code: int
    said: str
    cpu_s: float = 0.0


def _make_interpreter(folder: Path) -> None:
    """Make the interpreter of a copy: this one's packages, but the product from the copy.

    PYTHONPATH would not do: some tests set another one for the processes that they start.
    """
    venv.create(folder / "venv")
    base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", base))
    here = sysconfig.get_path("purelib")
    lines = f"{folder / 'tree'}\nimport site; site.addsitedir({here!r})\n"
    (packages / "copy.pth").write_text(lines, encoding="utf-8")


def _environment(folder: Path) -> dict[str, str]:
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "all",
        "XLA_FLAGS": FEW_OPTIMIZATIONS,  # as in the tests, whose programs a run then loads
    }
    left_out = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    inherited = {k: v for k, v in os.environ.items() if k not in left_out}
    return programs | inherited | {"XDG_CACHE_HOME": str(folder / "cache")}


def _failed(report: Path) -> list[str]:
    """Return the tests that failed, of a report in JUnit's format."""
    cases = ET.parse(report).iter("testcase")
    return [
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]


def _last_record(cwd: Path) -> RunFinished | None:
    """Return the last record of the one run in a directory; None if it left none that reads."""
    # Lines of a file that was lost or changed are saved beside it.
    stem, suffix = RECORDS_FILE.split(".")
    for records in sorted(cwd.glob(f"outputs/*/*/{stem}*.{suffix}")):
        with suppress(InputError):
            return read_run(records).finished
    return None


def kill_left(folder: Path) -> None:
    """Kill the processes that still run from a folder: a fault may have left some for ever."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(argument.startswith(f"{folder}/") for argument in process.cmdline()):
                process.kill()
