"""The steps in which a run saves its trainer, and those that it runs after a resume."""

import pytest

from kvpipe.config.schema import Kvpipe
from kvpipe.pipeline import facts
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.continuation import planned_steps, skipped_names
from kvpipe.plan.fold import check_order, made_before
from tests.helpers_config import compose_plain, config_of
from tests.refusal import refusal

READY = ["jax_ready", "engine_ready_dummy", "weights_streamed", "trainer_ready"]


def config(experiment: str, *overrides: str, resume_after: int | None = None) -> Kvpipe:
    plain = compose_plain(f"+experiment={experiment}", "repeat.times=3", *overrides)
    return config_of(plain | {"resume_after": resume_after})


def names(found: Kvpipe) -> list[str]:
    return [item.step.step for item in planned_steps(found)]


def own(pipeline: list[str], first: str, last: str, **more: object) -> Kvpipe:
    """Return a config of another pipeline that saves its trainer after each of three cycles."""
    plain = compose_plain("+experiment=tiny_sft", "trainer.checkpoint_every=1", "repeat.times=3")
    repeat = {"first": first, "last": last, "times": 3}
    phases = {"before": {"use": "train_step"}, "again": {"use": "train_step"}}
    phases = {name: options for name, options in phases.items() if name in pipeline}
    return config_of(plain | {"pipeline": pipeline, "phases": phases, "repeat": repeat} | more)


def test_the_trainer_is_saved_after_every_cycle_that_was_asked_for():
    saved = [
        name for name in names(config("tiny_sft", "trainer.checkpoint_every=2")) if "_sa" in name
    ]
    assert saved == ["trainer_saved#2"]
    each = names(config("tiny_sft", "trainer.checkpoint_every=1"))
    first = each.index("train_step")
    cycles = ["train_step", "trainer_saved", "train_step#2", "trainer_saved#2", "train_step#3"]
    assert each[first : first + 6] == [*cycles, "trainer_saved#3"]
    assert not any("_saved" in name for name in names(config("tiny_sft")))


def test_a_resumed_run_repeats_what_comes_before_the_cycles_and_goes_on_with_the_next():
    whole = names(config("tiny_sft", "trainer.checkpoint_every=1"))
    resumed = config("tiny_sft", "trainer.checkpoint_every=1", resume_after=2)
    left = names(resumed)
    skipped = ["train_step", "trainer_saved", "train_step#2", "trainer_saved#2"]
    assert left == [name for name in whole if name not in skipped]
    assert left[left.index("trainer_ready") + 1] == "train_step#3"
    assert skipped_names(resumed, [item.step for item in planned_steps(resumed)]) == skipped


def test_after_the_last_cycle_only_what_comes_after_the_cycles_is_left():
    left = names(config("tiny_sft", "trainer.checkpoint_every=1", resume_after=3))
    assert left[left.index("trainer_ready") + 1] == "loss_fell"


def test_the_engine_gets_the_trainers_weights_again_if_it_had_them_and_outputs_are_compared():
    """The rollout of the next cycle is held against an output that the checkpoint has."""
    left = names(config("tiny_rl_cycle", "trainer.checkpoint_every=1", resume_after=1))
    ready = left.index("trainer_ready")
    assert left[ready + 1 : ready + 4] == [
        "weights_synced_again",
        "trainer_offloaded_at_first",
        "generate_rollout#2",
    ]
    assert "weights_synced" not in left


def test_what_the_checkpoint_has_is_known_to_who_orders_what_is_left():
    """The plan orders the steps again with each action on the KV cache that it may choose."""
    planned = planned_steps(config("tiny_rl_cycle", "trainer.checkpoint_every=1", resume_after=1))
    assert made_before(planned) == {facts.output("generate_trained")}
    assert check_order([item.step for item in planned], made_before(planned)) == planned


@pytest.mark.parametrize(
    ("pipeline", "first", "last", "message"),
    [
        (
            [*READY, "before", "train_step"],
            *("train_step", "train_step"),
            "trainer.checkpoint_every: a run that is resumed after cycle 1 could not go on: step 'before' "
            "trains before the cycles, and would do so again; move it into them",
        ),
        (
            [*READY, "train_step", "weights_synced", "again"],
            *("train_step", "again"),
            "at the end of the cycle the trainer is ahead of the weights that step 'weights_synced' gave "
            "the engine; put a 'weights_synced' after the last training step",
        ),
        (
            [*READY, "trainer_dropped", "kv_cache_dropped", "kv_cache_rebuilt"],
            *("kv_cache_dropped", "kv_cache_rebuilt"),
            "'trainer_saved' needs a trainer on the devices, but step 'trainer_dropped' removed it",
        ),
        (
            [*READY, "train_step", "trainer_saved"],
            *("train_step", "train_step"),
            "pipeline: trainer.checkpoint_every adds the step 'trainer_saved', at the end of cycles; "
            "leave it out",
        ),
    ],
)
def test_a_run_that_could_not_be_resumed_is_refused_before_it_begins(
    pipeline, first, last, message
):
    assert message in refusal(planned_steps, own(pipeline, first, last))


def test_without_cycles_there_is_nothing_to_save_after():
    plain = compose_plain("trainer.checkpoint_every=1")
    assert refusal(build_steps, config_of(plain)) == (
        "trainer.checkpoint_every is 1, but the pipeline has no cycles; give them with repeat"
    )


def test_a_checkpoint_of_a_later_cycle_than_the_last_is_refused():
    late = config("tiny_sft", "trainer.checkpoint_every=1", resume_after=4)
    assert refusal(planned_steps, late) == (
        "resume: the checkpoint is of cycle 4, but repeat.times is 3; it must be at least 4"
    )
