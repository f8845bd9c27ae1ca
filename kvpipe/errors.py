"""The errors that kvpipe raises on purpose, each with the exit code it ends the process with.

Anything else that escapes is a defect of kvpipe and keeps its traceback.
"""

from typing import ClassVar

# EX_SOFTWARE of sysexits.h: a defect of kvpipe itself.
UNEXPECTED_EXIT_CODE = 70


class KvpipeError(Exception):
    """Base of every error that is meant for the person at the terminal."""

    exit_code: ClassVar[int] = 1


class InputError(KvpipeError):
    """The input is wrong (config, file, option, order of steps): nothing was started."""

    exit_code: ClassVar[int] = 2


class PhaseError(KvpipeError):
    """A phase failed, whatever failed it."""

    exit_code: ClassVar[int] = 3


class EngineError(PhaseError):
    """The engine refused, failed or died."""


class TrackingError(PhaseError):
    """Weights & Biases could not be reached or refused the run."""
