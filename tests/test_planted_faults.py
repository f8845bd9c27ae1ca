"""The planted faults: a fault that is not noticed fails the command, and so does one that is void.

The product here is a package of a few lines; its "run" is a real process that leaves records.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import psutil
import pytest

from tools.mutants.__main__ import FAULTS, ROOT, main
from tools.mutants.copies import Answer, Copy
from tools.mutants.faults import BrokenFault, read_fault
from tools.mutants.forked import Server, Servers, imported_by_pytest

PACKAGE = "PAGE = 8\nLINES = 3\n"
RUN = """
import json, os, sys
from kvpipe import PAGE
os.makedirs("outputs/tiny/1")
checks = [{"name": "page", "expected": 8, "actual": PAGE, "passed": PAGE == 8, "detail": ""}]
end = {"phase": "run_finished", "status": "passed" if PAGE == 8 else "failed", "elapsed_s": 1.0,
       "exit_code": 70 if PAGE == 70 else int(PAGE != 8), "run_dir": "outputs/tiny/1", "checks": checks}
with open("outputs/tiny/1/records.jsonl", "w") as records:
    print(json.dumps(end), file=records)
sys.exit(end["exit_code"])
"""
TESTS = """
import subprocess, sys
import kvpipe

def test_the_page_that_a_process_elsewhere_sees(tmp_path):
    code = "import kvpipe; print(kvpipe.PAGE)"
    path = {"PYTHONPATH": str(tmp_path)}  # as tests do that bring phases of their own
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True)
    assert done.stdout == b"8\\n"

def test_lines():
    assert kvpipe.LINES == 3

def test_nothing():
    pass
"""
ELSEWHERE = "tests/test_it.py::test_the_page_that_a_process_elsewhere_sees"
PAGE = ("PAGE = 8", "PAGE = 9")
LINES = ("LINES = 3", "LINES = 4")
BROKEN = ("PAGE = 8", "PAGE = 70")  # the run ends as with a NameError


OF_THE_SECOND_TIER = pytest.mark.nightly(
    finds="planted faults, which `make test-all` runs, that count as noticed although none noticed them"
)


def repository(root: Path, tests: str = TESTS) -> Path:
    for name, text in {
        "kvpipe/__init__.py": PACKAGE,
        "kvpipe/__main__.py": RUN,
        "tests/test_it.py": tests,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=root, check=True)
    (root / FAULTS).mkdir(parents=True)
    return root


def plant(root: Path, name: str, edit: tuple[str, str], **more: str | list[str]) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    old, new = map(json.dumps, edit)
    lines += ["[[edits]]", 'file = "kvpipe/__init__.py"', f"old = {old}", f"new = {new}"]
    (root / FAULTS / f"{name}.toml").write_text("\n".join(['title = "It is wrong"', *lines]))


def planted(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str):
    code = main(root, arguments)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@OF_THE_SECOND_TIER
def test_what_is_not_noticed_and_a_hole_that_is_closed_fail_and_the_rest_is_counted(
    tmp_path, capsys
):
    root = repository(tmp_path)
    plant(root, "noticed_elsewhere", PAGE, tests=[ELSEWHERE])
    plant(root, "noticed_by_the_run", PAGE, run="engine.tp_size=1")
    plant(root, "unnoticed", LINES, tests=[ELSEWHERE, "tests/test_it.py::test_nothing"])
    plant(root, "unnoticed_by_the_run", LINES, run="engine.tp_size=1")
    plant(root, "hole", LINES, tests=["tests/test_it.py"], run="a=1", hole="nobody counts lines")
    plant(root, "hole_that_is_closed", PAGE, tests=[ELSEWHERE], run="a=1", hole="it was one")
    plant(root, "broken", BROKEN, run="a=1")
    code, summary = planted(root, capsys)
    assert code == 1
    assert (summary["faults"], summary["noticed"]) == (7, 3)
    assert summary["holes"] == ["hole", "hole_that_is_closed"]
    assert summary["failed"] == {
        "unnoticed": "no test noticed it",
        "unnoticed_by_the_run": "the run passed",
        "broken": "the fault itself is broken: exit code 70 without a word",
        "hole_that_is_closed": "its hole is closed, delete 'hole': run: failed: page",
    }
    assert (root / "kvpipe/__init__.py").read_text() == PACKAGE


@OF_THE_SECOND_TIER
def test_all_that_is_noticed_passes_and_a_word_chooses_by_name(tmp_path, capsys):
    root = repository(tmp_path)
    plant(root, "page", PAGE, tests=[ELSEWHERE])
    plant(root, "void", ("PAGE = 7", "PAGE = 9"), tests=[ELSEWHERE])
    code, summary = planted(root, capsys, "-k", "page")
    assert (code, summary["faults"], summary["failed"]) == (0, 1, {})
    code, summary = planted(root, capsys)
    assert (code, summary["faults"]) == (1, 0)
    assert summary["failed"] == {"void": "kvpipe/__init__.py has the old text 0 times, not once"}
    code, summary = planted(root, capsys, "-k", "pgae")
    assert (code, summary["failed"]) == (
        1,
        {"-k pgae": "no fault in tests/mutants has such a name"},
    )


@OF_THE_SECOND_TIER
def test_a_test_that_fails_without_a_fault_notices_none(tmp_path, capsys):
    root = repository(tmp_path, TESTS.replace("LINES == 3", "LINES == 5"))
    plant(root, "page", PAGE, tests=["tests/test_it.py"])
    code, summary = planted(root, capsys)
    assert (code, summary["faults"]) == (1, 0)
    assert summary["failed"] == {"without a fault: tests": "test_it::test_lines"}
    code, summary = planted(root, capsys, "--tests-passed")
    assert (code, summary["faults"], summary["noticed"]) == (0, 1, 1)


EDIT = '[[edits]]\nfile = "a"\nold = "1"\nnew = "2"\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title = ", "Invalid value"),
        (f'title = "a"\ntest = ["b"]\n{EDIT}', "unexpected keyword argument 'test'"),
        ('title = "a"\ntests = ["b"]\n', "at least one"),
        (f'title = "a"\n{EDIT}', "no test and no run must notice it"),
        (f'title = "a"\nrun = "b"\nhole = "c"\n{EDIT}', "no test and no run must notice it"),
        (f'title = "a"\ntests = ["b"]\nhole = "c"\n{EDIT}', "no 'run' is given"),
        (f'title = "a"\nrun = "b"\nno_run = "c"\n{EDIT}', "but a 'run' is given"),
    ],
)
def test_a_file_that_is_no_fault_is_refused(tmp_path, content, message):
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(BrokenFault, match=message):
        read_fault(path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("a.py", "x", "y", "a.py has the old text 2 times, not once"),
        ("a.py", "1", "1", "old and new text are the same"),
        ("a.py", "1", "(", "a.py is no Python after the edit"),
        ("b.py", "1", "2", "b.py does not exist"),
    ],
)
def test_an_edit_that_does_not_apply_is_refused(tmp_path, name, old, new, message):
    (tmp_path / "a.py").write_text("x = 1\ny = x\n")
    plant_file = tmp_path / "fault.toml"
    edit = f'[[edits]]\nfile = "{name}"\nold = "{old}"\nnew = "{new}"\n'
    plant_file.write_text(f'title = "a"\ntests = ["b"]\n{edit}')
    with pytest.raises(BrokenFault, match=message):
        read_fault(plant_file).check(tmp_path)


def test_the_committed_faults_apply_and_reach_every_folder_of_the_product():
    """A change to a text that a fault replaces fails the quick tests."""
    faults = [read_fault(path) for path in (ROOT / FAULTS).glob("*.toml")]
    for fault in faults:
        fault.check(ROOT)
    assert len(faults) >= 30
    unknown = [fault.name for fault in faults if not fault.run and not fault.no_run]
    assert unknown == [], "give 'run', or 'no_run' with the reason why no run can notice the fault"
    packages = (path.parent for path in ROOT.glob("kvpipe/*/__init__.py"))
    folders = {path.relative_to(ROOT).as_posix() for path in packages} | {"phases", "conf"}
    files = [edit.file for fault in faults for edit in fault.edits]
    missed = {folder for folder in folders if not any(f.startswith(f"{folder}/") for f in files)}
    assert missed == set()


FACTS = """
import json, os, sys
from pathlib import Path

def test_facts():
    own = {name: getattr(sys, name) for name in ("executable", "prefix", "exec_prefix", "orig_argv")}
    own |= {"environ": dict(os.environ), "cwd": os.getcwd(), "path": sys.path, "argv": sys.argv[1:]}
    own |= {"ours": [name for name in sys.modules if name.split(".")[0] in ("kvpipe", "tools")]}
    Path("facts.json").write_text(json.dumps(own))
"""
FACTS_OF_JAX = """
import json, sys
from pathlib import Path

def test_facts(four_devices):
    import jax
    from kvpipe.engine import compat

    own = {"devices": str(jax.devices()), "engine": [n for n in sys.modules if "sgl_jax" in n]}
    before = set(sys.modules)
    own |= {"worker": compat.import_engine().__module__}
    own |= {"config": {name: repr(value) for name, value in jax.config.values.items()}}
    Path("facts.json").write_text(json.dumps(own))
    Path("imported.json").write_text(json.dumps(sorted({*sys.modules} - before)))
"""
FOR_EVER = """
import subprocess, sys, time

def test_for_ever():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)
"""


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[tuple[Copy, Server]]:
    """A copy of a repository with two more files of tests, and a server in its original."""
    root = repository(tmp_path / "root", FACTS)
    (root / "tests/test_ever.py").write_text(FOR_EVER)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    sound = Copy.of(root, tmp_path / "sound")
    imported = imported_by_pytest(sound.folder, sound.environment)
    server = Server(sound.folder, sound.environment, imported)
    yield sound.again(tmp_path / "copy"), server
    server.end()


def test_a_forked_process_finds_what_a_started_one_finds(copied: tuple[Copy, Server]) -> None:
    copy, server = copied
    found = []
    for of in (None, server):
        assert copy.test(["tests/test_it.py"], server=of) == Answer(cpu_s=ANY)
        found.append(json.loads((copy.tree / "facts.json").read_text()))
    started, forked = found
    assert forked == started
    assert forked["executable"].startswith(f"{copy.folder}/")


@OF_THE_SECOND_TIER
def test_a_forked_process_has_imported_jax_and_not_the_engine_and_finds_the_same(tmp_path):
    sound = Copy.of(ROOT, tmp_path / "sound")
    (sound.tree / "tests/test_it.py").write_text(FACTS_OF_JAX)
    copy = sound.again(tmp_path / "copy")
    servers, found, imported = Servers(sound.folder, sound.environment), [], []
    with servers.one(["tests/test_it.py::test_facts"]) as server:
        for of in (None, server):
            assert copy.test(["tests/test_it.py"], server=of) == Answer(cpu_s=ANY)
            found.append(json.loads((copy.tree / "facts.json").read_text()))
            imported.append(json.loads((copy.tree / "imported.json").read_text()))
    servers.end()
    started, forked = found
    assert forked == started
    started, forked = imported
    assert "transformers" in started
    assert {name.partition(".")[0] for name in forked} == {"sgl_jax"}


def test_a_forked_process_that_does_not_end_is_killed_with_all_that_it_started(
    copied: tuple[Copy, Server],
) -> None:
    copy, server = copied
    answer = replace(copy, limit_s=5).test(["tests/test_ever.py"], server=server)
    assert answer == Answer(problem="pytest: it did not end within 5 s")
    arguments = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [each for each in arguments if each[:1] == [f"{copy.folder}/venv/bin/python"]]
    assert copy.test(["tests/test_it.py"], server=server).problem == ""
