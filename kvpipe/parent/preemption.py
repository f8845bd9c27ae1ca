"""Handle a signal to a run that saves its trainer: end the step, save the trainer, and stop.

If no cycle has ended since the last save, there is nothing to save: the signal ends the run at once,
as it ends a run without checkpoints.
"""

from dataclasses import replace
from pathlib import Path

from kvpipe.checkpoints import resumable
from kvpipe.config.schema import Kvpipe
from kvpipe.errors import BAD_INPUT, HELD, Ending, Interrupted, ending_of
from kvpipe.pipeline.cycles import SAVED, base_name, cycle_of
from kvpipe.records.run import PhaseRecord


class Preemption:
    """Follow the cycles of a run by its records, and decide how a signal ends it.

    Attributes:
        signal: the received signal, once the worker is to stop because of it.
        obeyed: whether the worker has left out a step because of it.
    """

    def __init__(self, config: Kvpipe) -> None:
        trainer = config.trainer
        self._directory = trainer.checkpoint_dir
        self._last_step = config.repeat.last if config.repeat and trainer.checkpoint_every else None
        self._ended = self._saved = config.resume_after or 0
        self.signal: Interrupted | None = None
        self.obeyed = False

    def passed(self, record: PhaseRecord) -> None:
        """Note a step that passed."""
        step, cycle = base_name(record.phase), cycle_of(record.phase)
        if step == self._last_step and record.passed:
            self._ended = cycle
        elif step == SAVED and record.passed:
            self._saved = cycle

    def takes(self, signal: Interrupted) -> bool:
        """Whether the worker shall stop by itself, since a cycle has ended that is not saved."""
        if self._last_step is None or self._ended <= self._saved:
            return False
        self.signal = signal
        return True

    def ending(self, of_worker: Ending) -> Ending:
        """Return how a worker's part ended: by the signal, unless it had nothing left to do."""
        if self.signal is None or not self.obeyed:
            return of_worker
        ending = ending_of(self.signal)
        failed = f"; then: {of_worker.error}" if of_worker.error else ""
        return replace(ending, error=f"{ending.error}{failed}")

    def with_hint(self, ending: Ending, command: str) -> Ending:
        """Return the ending with the command that continues the run, if it has a checkpoint."""
        if ending.exit_code in (HELD, BAD_INPUT) or self._directory is None:
            return ending
        if (found := resumable.last(Path(self._directory))) is None:
            return ending
        return replace(
            ending, error=f"{ending.error}; {found} is saved; to go on after it: {command}"
        )
