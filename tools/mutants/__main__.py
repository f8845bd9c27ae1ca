"""Plant each fault of tests/mutants in a copy of the repository and see that it is noticed.

    make mutants                    all faults
    make mutants ARGS="-k kv"       those with 'kv' in their names; -k may be given several times

First the chosen tests and runs must pass without a fault, since a test that always fails notices
nothing; ``--tests-passed`` leaves the tests out where all of them have just passed. Then each fault
gets a copy of its own. It exits 1 if a fault is not noticed or no longer
applies, or if a run notices a fault that is listed as its known hole. The last line is JSON.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.mutants.copies import Answer, Copy, kill_left
from tools.mutants.faults import BrokenFault, Fault, read_fault
from tools.mutants.forked import Servers

ROOT = Path(__file__).parents[2]
FAULTS = "tests/mutants"
PACKAGES = ("kvpipe", "phases", "conf")
# Of the tests or the run of one fault; a minute is enough on a machine that does nothing else.
_LIMIT_S = 600.0
# One more than there are cores: while one waits, another computes.
_AT_ONCE = min(len(os.sched_getaffinity(0)) + 1, 4)
_NAME, _NOTICED = 40, 96  # columns of the table


@dataclass(frozen=True)
class Verdict:
    """Result of planting a fault.

    Attributes:
        fault: the fault.
        noticed_by: the test, and the checks of the run, that noticed it.
        problems: what is wrong: not noticed, or a known hole that is closed.
        cpu_s: CPU seconds of its tests and its run.
    """

    fault: Fault
    noticed_by: tuple[str, ...]
    problems: tuple[str, ...]
    cpu_s: float

    @property
    def row(self) -> str:
        """Its row of the table."""
        findings = ("FAILED", *self.problems) if self.problems else self.noticed_by
        return _row(self.fault.name, "; ".join(findings), f"{self.cpu_s:.1f}")


def main(root: Path = ROOT, arguments: Sequence[str] | None = None) -> int:
    """Plant the chosen faults; return the exit code."""
    parser = argparse.ArgumentParser(prog="make mutants", allow_abbrev=False)
    only = "only faults with WORD in their names"
    parser.add_argument("-k", dest="words", metavar="WORD", action="append", help=only)
    passed = "all tests have just passed: leave out their run without a fault"
    parser.add_argument("--tests-passed", action="store_true", help=passed)
    options = parser.parse_args(arguments)
    words = options.words or [""]
    began = time.monotonic()
    faults, broken = _read(root, words)
    verdicts: list[Verdict] = []
    with (
        tempfile.TemporaryDirectory(prefix="kvpipe-mutants-") as scratch,
        ThreadPoolExecutor(_AT_ONCE) as threads,
    ):
        sound = Copy.of(root, Path(scratch) / "sound")
        broken |= _broken(sound, faults)
        broken = broken or _not_the_copys(sound)
        broken = broken or _failing(sound, faults, options.tests_passed, threads)
        if not broken:
            print(_row("fault", "noticed by", "CPU s"), flush=True)
            servers = Servers(sound.folder, sound.environment)
            for verdict in threads.map(partial(_verdict, sound, servers), faults):
                print(verdict.row, flush=True)
                verdicts.append(verdict)
            servers.end()
    return _conclude(verdicts, broken, time.monotonic() - began)


def _read(root: Path, words: Sequence[str]) -> tuple[list[Fault], dict[str, str]]:
    """Return the chosen faults, and name → what is wrong with a file."""
    faults: list[Fault] = []
    broken: dict[str, str] = {}
    for path in sorted((root / FAULTS).glob("*.toml")):
        if any(word in path.stem for word in words):
            try:
                faults.append(read_fault(path))
            except BrokenFault as error:
                broken[path.stem] = str(error)
    if not faults and not broken:
        broken[f"-k {' '.join(words)}"] = f"no fault in {FAULTS} has such a name"
    return faults, broken


def _broken(sound: Copy, faults: Sequence[Fault]) -> dict[str, str]:
    """Return name → why a fault does not apply."""
    found: dict[str, str] = {}
    for fault in faults:
        try:
            fault.check(sound.tree)
        except BrokenFault as error:
            found[fault.name] = str(error)
    return found


def _not_the_copys(sound: Copy) -> dict[str, str]:
    """Return the first package that processes of the copy would import from somewhere else."""
    for package in PACKAGES:
        if (sound.tree / package).is_dir() and not sound.imports_own(package):
            return {package: "processes in other directories import another one than the copy's"}
    return {}


def _failing(
    sound: Copy, faults: Sequence[Fault], tests_passed: bool, threads: Executor
) -> dict[str, str]:
    """Return which of the chosen tests and runs fail without any fault.

    The copy then has the bytecode of all of them.
    """
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    runs = list(dict.fromkeys(fault.run for fault in faults if fault.run))
    sound.compile(PACKAGES)
    # Before anything writes into the tree that is copied.
    copies = [sound.again(sound.folder / f"run{number}") for number in range(len(runs))]
    compiled = threads.submit(sound.compile_tests, tests if tests_passed else ())
    failed = {} if tests_passed else _failing_tests(sound, tests)
    failed |= _failed(dict(zip(runs, threads.map(Copy.run, copies, runs), strict=True)))
    compiled.result()
    return failed


def _failing_tests(sound: Copy, tests: Sequence[str]) -> dict[str, str]:
    """Return which of the chosen tests fail without any fault."""
    if not tests:
        return {}
    # A file's tests share engines; processes for one file alone would only cost their start. The
    # files keep the order of tests/conftest.py: a test that imports jax without its fixture of
    # four devices must not be the first of a process.
    files = {test.partition("::")[0] for test in tests}
    by_file = ("-n", str(_AT_ONCE), "--dist", "loadfile", "--no-loadscope-reorder")
    return _failed({"tests": sound.test(tests, *(by_file if len(files) > 1 else ()))})


def _failed(answers: dict[str, Answer]) -> dict[str, str]:
    return {
        f"without a fault: {name}": failed
        for name, answer in answers.items()
        if (failed := answer.noticed_by or answer.problem)
    }


def _verdict(sound: Copy, servers: Servers, fault: Fault) -> Verdict:
    """Plant a fault in a copy of its own and find the test or run that notices it."""
    answers: list[Answer] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory(dir=sound.folder.parent, prefix="fault-") as folder:
        copy = sound.again(Path(folder), _LIMIT_S)
        fault.plant(copy.tree)
        if fault.tests:
            with servers.one(fault.tests) as server:
                answers.append(answer := copy.test(fault.tests, "-x", server=server))
            if not answer.noticed_by:
                problems.append(answer.problem or "no test noticed it")
        if fault.run:
            answers.append(answer := copy.run(fault.run))
            if answer.problem:
                problems.append(answer.problem)
            elif answer.noticed_by and fault.hole:
                problems.append(f"its hole is closed, delete 'hole': {answer.noticed_by}")
            elif not answer.noticed_by and not fault.hole:
                problems.append("the run passed")
        kill_left(copy.folder)
    noticed = tuple(answer.noticed_by for answer in answers if answer.noticed_by)
    return Verdict(fault, noticed, tuple(problems), sum(answer.cpu_s for answer in answers))


def _conclude(verdicts: Sequence[Verdict], broken: dict[str, str], seconds: float) -> int:
    """Print the known holes, the failures and the line of JSON; return the exit code."""
    failed = broken | {v.fault.name: "; ".join(v.problems) for v in verdicts if v.problems}
    holes = {v.fault.name: v.fault.hole for v in verdicts if v.fault.hole}
    for title, named in (("Known holes, which the run passes", holes), ("Failed", failed)):
        if named:
            print(f"\n{title}:", *(f"  {name}: {why}" for name, why in named.items()), sep="\n")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = {
        "faults": len(verdicts),
        "noticed": sum(not verdict.problems for verdict in verdicts),
        "seconds": round(seconds),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "holes": sorted(holes),
        "failed": failed,
    }
    print(f"\n{json.dumps(summary)}")
    return 1 if failed else 0


def _row(name: str, noticed: str, cpu_s: str) -> str:
    """Return a line of the table; the ids of parameters may be long and are cut."""
    cut = noticed if len(noticed) <= _NOTICED else f"{noticed[: _NOTICED - 1]}…"
    return f"{name:<{_NAME}}  {cut:<{_NOTICED}} {cpu_s:>5}"


if __name__ == "__main__":
    sys.exit(main())
