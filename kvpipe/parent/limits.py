"""The time limits of a run: of each step, and of the whole."""

import time
from contextlib import AbstractContextManager

from kvpipe.config.schema import RunnerConfig
from kvpipe.errors import TimedOut
from kvpipe.pipeline.cycles import base_name
from kvpipe.system.alarm import limited
from kvpipe.system.pipes import is_readable


class Limits:
    """Enforce ``runner.phase_timeout_s``, ``phase_timeouts`` and ``run_timeout_s``.

    The run's limit counts from the construction of this object.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self._config = config
        self._run_ends = _later(config.run_timeout_s)
        self._stage = self._stage_key = ""
        self._stage_s: float | None = None
        self._stage_ends: float | None = None

    def begin(self, stage: str) -> None:
        """Start the limit of a step, or of the stage before the first one."""
        own = self._config.phase_timeouts.get(base_name(stage))
        self._stage = stage
        self._stage_key = f"phase_timeouts.{base_name(stage)}" if own else "phase_timeout_s"
        self._stage_s = own or self._config.phase_timeout_s
        self._stage_ends = _later(self._stage_s)

    def wait(self, descriptor: int) -> None:
        """Wait until ``descriptor`` is readable.

        Raises:
            TimedOut: a limit expired first.
        """
        left_s, message = self._left()
        if not is_readable(descriptor, left_s):
            raise TimedOut(message)

    def in_parent(self) -> AbstractContextManager[None]:
        """Limit the body, which runs in this process.

        Raises:
            TimedOut: a limit expired first.
        """
        return limited(*self._left())

    def _left(self) -> tuple[float | None, str]:
        """Return the seconds left, None without a limit, and the message once they are over."""
        ends = [end for end in (self._run_ends, self._stage_ends) if end is not None]
        if not ends:
            return None, ""
        left_s = max(0.0, min(ends) - time.monotonic())
        if min(ends) == self._run_ends:
            return left_s, (
                f"the run took longer than runner.run_timeout_s = {self._config.run_timeout_s:g} s;"
                f" it was in step {self._stage!r}"
            )
        return left_s, (
            f"step {self._stage!r} took longer than runner.{self._stage_key} = {self._stage_s:g} s"
        )


def _later(seconds: float | None) -> float | None:
    """Monotonic deadline in ``seconds``, or None for no limit."""
    return None if seconds is None else time.monotonic() + seconds
