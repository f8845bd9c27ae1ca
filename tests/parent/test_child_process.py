"""Children that speak JSON lines, without an engine: small modules that a test writes."""

import os
import signal
import sys
import textwrap
import time

import psutil
import pytest

from kvpipe.parent.child_process import start_child

ECHO = """
    import json, os, sys
    from kvpipe.parent.child_process import send
    with os.fdopen(int(sys.argv[1]), "w") as channel:
        for line in sys.stdin:
            print("noise of the engine", flush=True)
            send(channel, {"got": json.loads(line)})
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a child that runs ``code``."""
    monkeypatch.chdir(tmp_path)

    def started(code):
        (tmp_path / "module_of_a_test.py").write_text(textwrap.dedent(code))
        paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        environ = os.environ | {"PYTHONPATH": paths}
        return start_child("module_of_a_test", tmp_path / "child.log", environ, 10.0)

    return started


def test_each_job_is_answered_and_what_the_child_prints_is_in_its_log(start):
    with start(ECHO) as child:
        for number in (1, 2):
            child.send({"number": number, "text": "zwölf\u2028"})
            job = {"number": number, "text": "zwölf\u2028"}
            assert next(child.messages()) == {"got": job}
    assert child.process.returncode == 0
    assert child.log_tail() == "noise of the engine\nnoise of the engine"


def test_a_module_that_lies_in_the_working_directory_does_not_take_the_place_of_another(
    start, tmp_path, monkeypatch
):
    """``python -m`` looks there first; the installed command ``kvpipe`` does not look there."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise AssertionError('executed')\n")
    monkeypatch.chdir(elsewhere)
    with start(ECHO) as child:
        child.send({"a": 1})
        assert next(child.messages()) == {"got": {"a": 1}}


def test_the_log_takes_any_text_whatever_the_encoding_of_the_parents_output(start, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with start("print('zwölf 世 \\udcff', flush=True)\n") as child:
        assert list(child.messages()) == []
    assert child.log_tail() == "zwölf 世 \\udcff"


def test_the_end_of_the_jobs_ends_the_messages(start):
    with start(ECHO) as child:
        child.send({"a": 1})
        child.end_jobs()
        assert list(child.messages()) == [{"got": {"a": 1}}]


def test_a_torn_last_line_is_left_out(start):
    torn = 'import os, sys\nos.write(int(sys.argv[1]), b\'{"a": 1}\\n{"b":\')\n'
    with start(torn) as child:
        assert list(child.messages()) == [{"a": 1}]


def test_a_child_that_was_killed_is_reported_with_its_signal_and_gets_no_more_jobs(start):
    with start("import os\nprint('last words', flush=True)\nos.kill(os.getpid(), 9)") as child:
        assert next(child.messages(), None) is None
        assert child.how_it_ended() == "SIGKILL"
        child.send({"a": 1})
        assert child.log_tail() == "last words"


def test_a_child_that_exits_is_reported_with_its_code(start):
    with start("import sys\nsys.exit(7)") as child:
        assert child.how_it_ended() == "exit code 7"


def test_an_error_of_the_parent_ends_the_child_and_its_own_children(start):
    code = """
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        os.write(int(sys.argv[1]), f"{child.pid}\\n".encode())
        time.sleep(60)
    """
    with pytest.raises(KeyboardInterrupt), start(code) as child:
        grandchild = next(child.messages())
        raise KeyboardInterrupt
    assert child.process.returncode == -signal.SIGKILL
    assert has_ended(grandchild)


def has_ended(pid):
    """Whether a process comes to its end; what nobody waits for stays as a zombie."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False
