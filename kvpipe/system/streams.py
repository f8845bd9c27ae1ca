"""The standard streams of a command, and the rules for everything that it prints.

- Any text can be printed, whatever the encoding: a character that it lacks is replaced or escaped.
- A failure to write stdout is an error of its own, so that it is not taken for one of another file.
- A failure to write stderr is ignored: there is nobody to report it to.
- A closed stream is not replaced by the next file that is opened.
"""

import codecs
import io
import os
import signal
import sys
from contextlib import suppress
from typing import Any, TextIO, override

from kvpipe.errors import OutputError

_ERRORS = "kvpipe.readable"
# Of the same width, so that tables stay aligned.
_PLAIN = str.maketrans("–−×·…✗", "--x.~x")


class _Output(io.TextIOWrapper):
    @property
    @override
    def name(self) -> str:
        return "<stdout>"

    @override
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(self.name, error) from None

    @override
    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(self.name, error) from None


class _Messages(io.TextIOWrapper):
    @override
    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    @override
    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def prepare() -> None:
    """Replace the standard streams of this process."""
    codecs.register_error(_ERRORS, _readable)
    # stdout is opened for reading, so that the first write to it fails as in other programs.
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            os.dup2(opened, descriptor)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
    sys.stdout = sys.__stdout__ = _replaced(sys.stdout, _Output)
    sys.stderr = sys.__stderr__ = _replaced(sys.stderr, _Messages)


def end() -> None:
    """Discard output that cannot be written, and a late Ctrl-C: Python would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OutputError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Return plain signs in place of typographic ones, and escapes of other characters."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def _replaced(stream: Any, cls: type[io.TextIOWrapper]) -> TextIO:
    options = {"encoding": stream.encoding, "errors": _ERRORS}
    options |= {name: getattr(stream, name) for name in ("line_buffering", "write_through")}
    return cls(stream.detach(), **options)
