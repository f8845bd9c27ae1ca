"""Output of every command to every kind of stream."""

import os
import signal
import subprocess
import sys

import pytest

from kvpipe.system import streams
from tests.command import KVPIPE, environment
from tests.in_process import callable_in

PREPARED = """
import sys
from kvpipe.system import streams
streams.prepare()
"""
TEXT = "– × … é 世 \udcff"
PRINT = f"{PREPARED}print({TEXT!a})\nprint({TEXT!a}, file=sys.stderr)\n"
ESCAPED = r"\u4e16 \udcff"


def python(code, shell="", **variables):
    """Run code with streams that the shell redirects as given."""
    command = f'exec "$0" -c "$1" {shell}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, code],
        env={"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"} | variables,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "encoding", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "ascii", rf"- x ~ \xe9 {ESCAPED}"),
        ({"PYTHONIOENCODING": "ascii:strict"}, "ascii", rf"- x ~ \xe9 {ESCAPED}"),
        ({"LC_ALL": "C"}, "ascii", rf"- x ~ \xe9 {ESCAPED}"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1", f"- × ~ é {ESCAPED}"),
        ({"PYTHONIOENCODING": "cp1252"}, "cp1252", f"– × … é {ESCAPED}"),
        ({"PYTHONIOENCODING": "utf-8"}, "utf-8", r"– × … é 世 \udcff"),
        ({"PYTHONIOENCODING": "utf-16-le"}, "utf-16-le", r"– × … é 世 \udcff"),
    ],
)
def test_any_text_can_be_printed_in_any_encoding(variables, encoding, shown):
    done = python(PRINT, **variables)
    assert done.returncode == 0
    assert done.stdout.decode(encoding) == done.stderr.decode(encoding) == f"{shown}\n"


@pytest.mark.parametrize(
    ("shell", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
def test_an_output_that_cannot_be_written_is_an_error_of_its_own(shell, reason):
    code = f"""{PREPARED}
from kvpipe.errors import OutputError
try:
    print("text", flush=True)
except OutputError as error:
    print(error, error.exit_code, file=sys.stderr)
streams.end()
"""
    done = python(code, shell)
    reported = f"<stdout>: cannot write the output: {reason} 3\n"
    assert (done.returncode, done.stderr.decode()) == (0, reported)


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_a_message_that_nobody_can_get_changes_neither_the_output_nor_the_end(shell):
    code = f"{PREPARED}print('message' * 9999, file=sys.stderr)\nprint('text')\nstreams.end()\n"
    done = python(code, shell)
    assert (done.returncode, done.stdout) == (0, b"text\n")


def test_a_file_that_is_opened_later_does_not_get_what_is_printed(tmp_path):
    """The descriptors of closed streams are the first that a process would give to its files."""
    path = tmp_path / "file"
    code = f"""{PREPARED}
with open({str(path)!r}, "w") as file:
    print("printed", file=sys.stderr)
    print(sys.stdin.read(), file=file, end="")
    assert file.fileno() > 2
"""
    done = python(code, "<&- >&- 2>&-")
    assert (done.returncode, path.read_text()) == (0, "")


def test_a_command_whose_output_is_lost_fails(tmp_path):
    """The stream fails when the process ends: nothing was written before."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *KVPIPE, "check"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    reported = "kvpipe: <stdout>: cannot write the output: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (3, reported)


@pytest.mark.parametrize(
    "arguments",
    [
        ("phases",),
        ("phases", "describe.format=json"),
        ("--help",),
        ("check", "-m", "engine.page_size=1,16"),
    ],
)
def test_a_verb_whose_output_is_lost_fails(arguments, tmp_path, monkeypatch, capfd):
    output = streams._replaced(os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"), streams._Output)
    with callable_in(tmp_path, monkeypatch, capfd) as kvpipe:
        monkeypatch.setattr(sys, "stdout", output)
        done = kvpipe(*arguments)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        streams.end()
        monkeypatch.undo()
    output.close()
    reported = "kvpipe: <stdout>: cannot write the output: No space left on device\n"
    lines = [line for line in done.err.splitlines(keepends=True) if "[INFO]" not in line]
    assert (done.code, lines) == (3, [reported])


def test_ctrl_c_while_kvpipe_is_imported_ends_it_without_a_traceback():
    code = """
import sys

class PressedThen:
    def find_spec(self, name, path=None, target=None):
        if name == "hydra":
            raise KeyboardInterrupt

sys.meta_path.insert(0, PressedThen())
from kvpipe.__main__ import main
main()
"""
    done = python(code)
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr.decode() == "kvpipe: interrupted by Ctrl-C\n"
