"""The time limits of a run: of each step, and of the whole."""

import select
import time

from kvpipe.config.schema import RunnerConfig
from kvpipe.errors import TimedOut
from kvpipe.pipeline.cycles import base_name


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
        ends = [end for end in (self._run_ends, self._stage_ends) if end is not None]
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        left_ms = max(0.0, min(ends) - time.monotonic()) * 1000 if ends else None
        if poll.poll(left_ms):
            return
        if self._run_ends is not None and min(ends) == self._run_ends:
            raise TimedOut(
                f"the run took longer than runner.run_timeout_s = {self._config.run_timeout_s:g} s;"
                f" it was in step {self._stage!r}"
            )
        raise TimedOut(
            f"step {self._stage!r} took longer than runner.{self._stage_key} = {self._stage_s:g} s"
        )


def _later(seconds: float | None) -> float | None:
    """Monotonic deadline in ``seconds``, or None for no limit."""
    return None if seconds is None else time.monotonic() + seconds
