"""Names of repeated steps.

A pipeline may repeat a stretch of its steps (``repeat`` in the config). The steps of cycle k ≥ 2 are
called ``name#k``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvpipe.config.schema import RepeatConfig
from kvpipe.errors import InputError
from kvpipe.suggest import nearest

CYCLE_MARK = "#"
SAVED = "trainer_saved"
"""Step, and its phase, at the end of each cycle that ``trainer.checkpoint_every`` names."""
MOST_STEPS = 100_000
"""Most steps of a pipeline, with its repetitions; their records and the report stay readable."""


def base_name(step: str) -> str:
    """Return the name of a step without its cycle."""
    return step.partition(CYCLE_MARK)[0]


def cycle_of(step: str) -> int:
    """Return the cycle of a step, 1 for the first and for steps that are not repeated."""
    return int(step.partition(CYCLE_MARK)[2] or 1)


@dataclass(frozen=True)
class Cycle:
    """A cycle of the repeated steps: its number, from 1, and their names in the first cycle."""

    number: int
    steps: frozenset[str]

    @property
    def before(self) -> "Cycle":
        """The cycle before; there is none before the first."""
        return Cycle(self.number - 1, self.steps)

    def name(self, step: str) -> str:
        """Return what ``step`` is called in this cycle; a step that is not repeated has one name."""
        if self.number == 1 or step not in self.steps:
            return step
        return f"{step}{CYCLE_MARK}{self.number}"


def repeated_steps(pipeline: Sequence[str], repeat: RepeatConfig | None) -> frozenset[str]:
    """Return the names of the steps that are repeated.

    Raises:
        InputError: as of :func:`repeated`.
    """
    return frozenset(pipeline[_stretch(pipeline, repeat)] if repeat else ())


def repeated(
    pipeline: Sequence[str], repeat: RepeatConfig | None, saved_every: int = 0
) -> list[str]:
    """Return the names of all steps, those of each further cycle after the first.

    After every ``saved_every`` cycles, unless it is 0, comes :data:`SAVED`.

    Raises:
        InputError: a step of ``repeat`` is not in the pipeline, the last comes before the first, or
            there are too many steps.
    """
    stretch = _stretch(pipeline, repeat) if repeat else slice(0, 0)
    times, steps = repeat.times if repeat else 1, frozenset(pipeline[stretch])
    saves = times // saved_every if saved_every else 0
    total = len(pipeline) + (times - 1) * len(steps) + saves
    if total > MOST_STEPS:
        key = f"repeat.times is {times}" if repeat else "pipeline"
        raise InputError(f"{key}: the pipeline has {total:,} steps, at most {MOST_STEPS:,} can run")
    names = list(pipeline[: stretch.start])
    for cycle in (Cycle(number, steps | {SAVED}) for number in range(1, times + 1)):
        names += map(cycle.name, pipeline[stretch])
        if saved_every and cycle.number % saved_every == 0:
            names.append(cycle.name(SAVED))
    return [*names, *pipeline[stretch.stop :]]


def _stretch(pipeline: Sequence[str], repeat: RepeatConfig) -> slice:
    """Return the positions of the repeated steps in the pipeline."""
    for key, step in (("first", repeat.first), ("last", repeat.last)):
        if step not in pipeline:
            raise InputError(
                f"repeat.{key}: the pipeline has no step {step!r}; {nearest(step, pipeline)}"
            )
    start, end = pipeline.index(repeat.first), pipeline.index(repeat.last) + 1
    if start >= end:
        raise InputError(
            f"repeat: {repeat.last!r} comes before {repeat.first!r} in the pipeline; "
            "'first' and 'last' are the ends of the stretch, in its order"
        )
    return slice(start, end)
