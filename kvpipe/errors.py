"""The errors that kvpipe raises on purpose, and every exit code that it ends a process with.

Anything else that escapes is a defect of kvpipe and keeps its traceback.
"""

import errno
from typing import ClassVar

HELD = 0
CHECK_FAILED = 1
BAD_INPUT = 2
FAILED = 3
OUT_OF_MEMORY = 4
TIMED_OUT = 5
# EX_SOFTWARE of sysexits.h.
DEFECT = 70
# A process that signal n ended is told apart by 128 + n, as shells do.
SIGNALLED = 128

EXIT_CODES = {
    str(HELD): "all that was asked for held",
    str(CHECK_FAILED): "a check failed",
    str(BAD_INPUT): "wrong input; the engine was not started",
    str(FAILED): "a phase failed: the engine, W&B, the disk",
    str(OUT_OF_MEMORY): "out of memory, on a device or on the host",
    str(TIMED_OUT): "a time limit was reached",
    str(DEFECT): "a defect of kvpipe",
    f"{SIGNALLED} + n": "interrupted by signal n: 130 Ctrl-C, 143 terminated",
}

# What jax, the C++ library and Linux say when there is no memory left.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "std::bad_alloc", "MemoryError", "Cannot allocate memory")


class KvpipeError(Exception):
    """Base of every error that is meant for the person at the terminal."""

    exit_code: ClassVar[int] = CHECK_FAILED


class InputError(KvpipeError):
    """The input is wrong (config, file, option, order of steps): nothing was started."""

    exit_code: ClassVar[int] = BAD_INPUT


class PhaseError(KvpipeError):
    """A phase failed, whatever failed it."""

    exit_code: ClassVar[int] = FAILED


class EngineError(PhaseError):
    """The engine refused, failed or died."""


class TrackingError(PhaseError):
    """Weights & Biases could not be reached or refused the run."""


class RecordError(PhaseError):
    """A record could not be written, e.g. because the disk is full."""


class OutOfMemory(KvpipeError):
    """A device or the host has no memory left."""

    exit_code: ClassVar[int] = OUT_OF_MEMORY


class TimedOut(KvpipeError):
    """A time limit of the config was reached."""

    exit_code: ClassVar[int] = TIMED_OUT


def says_no_memory(text: str) -> bool:
    """Whether a message or a log says that an allocation failed."""
    return any(sign in text for sign in _NO_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is a failed allocation."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if says_no_memory(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def failure_of(step: str, error: Exception) -> KvpipeError:
    """Return what a step's own exception is for the person at the terminal."""
    message = f"step {step!r}: {type(error).__name__}: {error}"
    return OutOfMemory(message) if is_out_of_memory(error) else PhaseError(message)
