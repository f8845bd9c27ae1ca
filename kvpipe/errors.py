"""The errors that kvpipe raises on purpose, and every exit code of its processes.

Any other exception that escapes is a defect of kvpipe and keeps its traceback.
"""

import errno
import signal
from dataclasses import dataclass
from typing import ClassVar

HELD = 0
CHECK_FAILED = 1
BAD_INPUT = 2
FAILED = 3
OUT_OF_MEMORY = 4
TIMED_OUT = 5
WRONG_WEIGHTS = 6
# EX_SOFTWARE of sysexits.h.
DEFECT = 70
# A process ended by signal n exits with 128 + n, as in shells.
SIGNALLED = 128

EXIT_CODES = {
    str(HELD): "success",
    str(CHECK_FAILED): "a check failed",
    str(BAD_INPUT): "wrong input; the engine was not started",
    str(FAILED): "a phase failed: the engine, W&B, the disk; or the output cannot be written",
    str(OUT_OF_MEMORY): "out of memory, on a device or on the host",
    str(TIMED_OUT): "a time limit was reached",
    str(
        WRONG_WEIGHTS
    ): "the engine refused weights: a value is not finite, or a tree is another model's",
    str(DEFECT): "a defect of kvpipe",
    f"{SIGNALLED} + n": "interrupted by signal n: 130 Ctrl-C, 143 terminated",
}

# How jax, the C++ library and Linux report that no memory is left.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "std::bad_alloc", "MemoryError", "Cannot allocate memory")


class KvpipeError(Exception):
    """Base of every error whose message is for the person at the terminal."""

    exit_code: ClassVar[int] = CHECK_FAILED


class InputError(KvpipeError):
    """The input is wrong (config, file, option, order of steps), and nothing was started."""

    exit_code: ClassVar[int] = BAD_INPUT


class CheckFailed(KvpipeError):
    """A check of a phase did not pass; the record says which."""


class PhaseError(KvpipeError):
    """A phase failed."""

    exit_code: ClassVar[int] = FAILED


class EngineError(PhaseError):
    """The engine refused, failed or died."""


class WeightsError(EngineError):
    """Weights are not the model's, or not finite: values, which headers and configs do not show."""

    exit_code: ClassVar[int] = WRONG_WEIGHTS


class TrackingError(PhaseError):
    """Weights & Biases could not be reached or refused the run."""


class RecordError(PhaseError):
    """A record could not be written, e.g. because the disk is full."""


class OutputError(PhaseError):
    """Standard output cannot be written: its disk is full, its reader has gone, or it is closed."""

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(f"{name}: cannot write the output: {error.strerror}")
        self.strerror = error.strerror


class OutOfMemory(KvpipeError):
    """A device or the host has no memory left."""

    exit_code: ClassVar[int] = OUT_OF_MEMORY


class TimedOut(KvpipeError):
    """A time limit of the config expired."""

    exit_code: ClassVar[int] = TIMED_OUT


class Interrupted(BaseException):
    """A signal asked the run to end; the exit code is that of a process that the signal ended."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} ended the run")
        self.exit_code = SIGNALLED + signum


@dataclass(frozen=True)
class Ending:
    """The end of a run or of a part of it.

    Attributes:
        exit_code: exit code of the process.
        error: why it failed, in one message; None if it passed.
        failing_phase: the step that failed first, if it is not the last one that began.
        kind: name of the error's class.
    """

    exit_code: int = HELD
    error: str | None = None
    failing_phase: str | None = None
    kind: str = ""


def ending_of(error: BaseException, step: str | None = None) -> Ending:
    """Return the ending that an error of any class means: its exit code and its message.

    One that kvpipe did not raise on purpose is a defect, unless it reports a failed allocation.
    """
    kind = type(error).__name__
    on_purpose = isinstance(error, KvpipeError | Interrupted)
    exit_code = error.exit_code if on_purpose else DEFECT
    # The class of any other error that is raised on purpose is more specific than its text.
    if (isinstance(error, PhaseError) or not on_purpose) and is_out_of_memory(error):
        exit_code = OUT_OF_MEMORY
    return Ending(exit_code, str(error) if on_purpose else f"{kind}: {error}", step, kind)


def says_no_memory(text: str) -> bool:
    """Whether a message or a log reports a failed allocation."""
    return any(sign in text for sign in _NO_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one in its chain of causes, is a failed allocation."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if says_no_memory(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def failure_of(step: str, error: Exception) -> KvpipeError:
    """Convert an exception of a step to an error for the person at the terminal."""
    message = f"step {step!r}: {type(error).__name__}: {error}"
    return OutOfMemory(message) if is_out_of_memory(error) else PhaseError(message)
