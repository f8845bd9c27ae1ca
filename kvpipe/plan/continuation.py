"""Select the steps that a config runs: all of them or, after a checkpoint, those that are left.

A resumed run repeats the steps before the cycles (the engine is a new one), makes the trainer of the
checkpoint, and continues with the next cycle. If the engine had the trainer's weights then, the sync
of that cycle is repeated too, as soon as the trainer is there.
"""

from collections.abc import Sequence

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.cycles import SAVED, base_name, cycle_of, repeated_steps
from kvpipe.pipeline.phase import Phase
from kvpipe.pipeline.steps import step_names
from kvpipe.plan.fold import PlannedStep
from kvpipe.plan.kv_choice import in_order, ordered


def planned_steps(config: Kvpipe) -> tuple[PlannedStep, ...]:
    """Return the steps that the config runs, with their effects.

    Raises:
        InputError: their order is wrong, or a run that saves its trainer could not be resumed.
    """
    planned = ordered(config)
    every, repeat = config.trainer.checkpoint_every, config.repeat
    if config.resume_after is not None:
        return _left(planned, config, config.resume_after)
    if repeat and 0 < every < repeat.times:
        try:
            _left(planned, config, every)
        except InputError as error:
            raise InputError(
                f"trainer.checkpoint_every: a run that is resumed after cycle {every} could not go "
                f"on: {error}"
            ) from None
    return planned


def skipped_names(config: Kvpipe, steps: Sequence[Phase]) -> list[str]:
    """Return the names of the steps of a pipeline that are not among those that run."""
    run = {step.step for step in steps}
    return [name for name in step_names(config) if name not in run]


def kept_outputs(cycle: int, steps: Sequence[str]) -> list[str]:
    """Return those of the steps whose outputs steps after a cycle may compare with.

    They are of the cycle itself, of the first one, or not repeated.
    """
    return [step for step in steps if cycle_of(step) in (1, cycle)]


def _left(planned: Sequence[PlannedStep], config: Kvpipe, after: int) -> tuple[PlannedStep, ...]:
    """Return the steps that are left after a cycle."""
    repeat = config.repeat
    if repeat is None or after > repeat.times:
        times = repeat.times if repeat else 0
        raise InputError(
            f"resume: the checkpoint is of cycle {after}, but repeat.times is {times}; it must be "
            f"at least {after}"
        )
    stretch = repeated_steps(config.pipeline, repeat) | {SAVED}
    done = [item for item in planned if _is_done(item.step.step, stretch, after)]
    left = [item for item in planned if not _is_done(item.step.step, stretch, after)]
    before = left[: config.pipeline.index(repeat.first)]
    steps = [item.step for item in left]
    if (sync := _sync(before, done)) is not None:
        ready = [facts.TRAINER_LIVE in item.facts for item in before]
        steps.insert(ready.index(True) + 1, sync)
    made = map(facts.output, kept_outputs(after, [item.step.step for item in done]))
    return in_order(steps, config.engine.max_total_tokens, set(made))


def _is_done(step: str, stretch: frozenset[str], after: int) -> bool:
    return base_name(step) in stretch and cycle_of(step) <= after


def _sync(before: Sequence[PlannedStep], done: Sequence[PlannedStep]) -> Phase | None:
    """Return the last step that gave the engine the trainer's weights; None if none did.

    Raises:
        InputError: the engine's weights are then neither the model's nor the trainer's, or the
            steps before the cycles train.
    """
    for item in before:
        if facts.TRAINER_AHEAD in item.effect.adds:
            raise InputError(
                f"step {item.step.step!r} trains before the cycles, and would do so again; move it "
                "into them"
            )
    syncs = [item.step for item in done if facts.TRAINER_AHEAD in item.effect.removes]
    if syncs and facts.TRAINER_AHEAD in done[-1].facts:
        raise InputError(
            f"at the end of the cycle the trainer is ahead of the weights that step "
            f"{syncs[-1].step!r} gave the engine; put a 'weights_synced' after the last training step"
        )
    return syncs[-1] if syncs else None
