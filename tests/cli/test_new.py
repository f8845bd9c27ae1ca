"""``kvpipe new phase NAME`` writes a phase that works, with a test that passes."""

import importlib.util
import subprocess
import sys

import pytest

from kvpipe.pipeline.phase_files import phase_names
from tests.helpers_config import ROOT
from tests.in_process import files

WRITTEN = ["mine", "mine/phases", "mine/phases/kv_layers.py", "mine/tests"]
PATH = "phase_path=[mine/phases]"


def test_a_new_phase_passes_the_check_its_test_and_the_linter(kvpipe, tmp_path):
    done = kvpipe("new", "phase", "kv_layers", PATH)
    assert (done.code, done.err) == (0, "")
    assert files(tmp_path) == [*WRITTEN, "mine/tests/test_kv_layers.py"]
    assert done.out.startswith("mine/phases/kv_layers.py\nmine/tests/test_kv_layers.py\n")
    assert "phase_path: [mine/phases]\npipeline:\n  - kv_layers\n" in done.out
    command = done.out.splitlines()[-1]
    assert (
        command == f"python -m kvpipe check '{PATH}' pipeline_edit.after.kv_cache_rebuilt=kv_layers"
    )
    checked = kvpipe("check", PATH, "pipeline_edit.after.kv_cache_rebuilt=kv_layers")
    assert (checked.code, checked.err) == (0, "")
    _run_tests_of(tmp_path / "mine/tests/test_kv_layers.py")
    for arguments in (["check"], ["format", "--check"]):
        config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "mine/phases"]
        linted = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, *config], cwd=tmp_path, capture_output=True
        )
        assert linted.returncode == 0, linted.stdout


def _run_tests_of(path):
    spec = importlib.util.spec_from_file_location("written_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_without_a_phase_path_it_lies_in_phases_of_the_working_directory(kvpipe, tmp_path):
    done = kvpipe("new", "phase", "kv_layers")
    assert done.code == 0
    assert "phase_path: [phases]\n" in done.out
    assert {"phases/kv_layers.py", "tests/test_kv_layers.py"} <= {*files(tmp_path)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("phase", "new: give a kind and a name, not 'phase': new phase NAME"),
        ("model it", "new: give a kind and a name, not 'model it': new phase NAME"),
        (
            "phase Kv-Layers",
            "new phase: 'Kv-Layers' is not a valid name; write lower-case letters, digits and '_', a letter first",
        ),
        (
            "phase class",
            "new phase: 'class' is not a valid name; write lower-case letters, digits and '_', a letter first",
        ),
        ("phase generate", "new phase: there is 'generate' already; choose another name"),
        ("phase run_planned", "new phase: there is 'run_planned' already; choose another name"),
    ],
)
def test_a_name_that_a_phase_cannot_have_is_refused(kvpipe, tmp_path, words, message):
    done = kvpipe("new", *words.split(" "))
    assert (done.code, done.out, done.err) == (2, "", f"kvpipe: {message}\n")
    assert files(tmp_path) == []


def test_no_file_is_written_over(kvpipe, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text("mine\n")
    done = kvpipe("new", "phase", "it")
    assert (done.code, done.err) == (
        2,
        "kvpipe: new phase: there is tests/test_it.py already; choose another name\n",
    )
    assert files(tmp_path) == ["tests", "tests/test_it.py"]
    (tmp_path / "phases").write_text("a file\n")
    refused = kvpipe("new", "phase", "other")
    assert refused.err.startswith("kvpipe: new phase: cannot write phases/other.py: ")
    assert "other" not in phase_names()
