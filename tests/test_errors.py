"""One way from an exception to an exit code and a message."""

import errno
import signal

import pytest

from kvpipe.engine.multihost import HostFailed
from kvpipe.errors import (
    Ending,
    EngineError,
    InputError,
    Interrupted,
    KvpipeError,
    OutOfMemory,
    TimedOut,
    WeightsError,
    ending_of,
)

FULL = "RESOURCE_EXHAUSTED: out of HBM"


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (KvpipeError("a check"), 1, "a check"),
        (InputError("a typo"), 2, "a typo"),
        (EngineError("it died"), 3, "it died"),
        (OutOfMemory("no room"), 4, "no room"),
        (TimedOut("too long"), 5, "too long"),
        (WeightsError("a NaN"), 6, "a NaN"),
        (HostFailed("host 1: no room", 4), 4, "host 1: no room"),
        (Interrupted(signal.SIGTERM), 143, "SIGTERM ended the run"),
        (KeyError("k"), 70, "KeyError: 'k'"),
        (EngineError(FULL), 4, FULL),
        (caused_by(EngineError("it died"), MemoryError()), 4, "it died"),
        (RuntimeError(FULL), 4, f"RuntimeError: {FULL}"),
        (OSError(errno.ENOMEM, "no"), 4, "OSError: [Errno 12] no"),
    ],
)
def test_an_error_ends_the_run_with_the_exit_code_of_its_class(error, exit_code, message):
    assert ending_of(error, "step") == Ending(exit_code, message, "step", type(error).__name__)


@pytest.mark.parametrize("kind", [KvpipeError, InputError, TimedOut])
def test_a_text_about_memory_does_not_change_what_the_class_of_an_error_says(kind):
    """A check that compares texts, or a program that does not compile for its target, quotes it."""
    assert ending_of(kind(FULL)).exit_code == kind.exit_code
