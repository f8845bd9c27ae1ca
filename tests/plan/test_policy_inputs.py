"""Rollouts and prompts that GRPO cannot learn from are refused before anything is started."""

import pytest

from kvpipe.cli.common import checked_steps
from kvpipe.plan.inputs import check_inputs
from kvpipe.plan.kv_choice import ordered
from tests.helpers_config import compose_plain, config_of
from tests.refusal import refusal

GRPO = "+experiment=tiny_grpo"
REFUSED = {
    "sampling.n=1": "step 'rollout' makes 1 sample of each prompt (sampling.n, or its own option)",
    "trainer.batch_size=24": (
        "trainer.batch_size is 24, but step 'rollout' makes 16 samples (2 prompts, 8 of each); set "
        "trainer.batch_size=16"
    ),
    "sampling.temperature=0.7": "step 'rollout' samples with temperature=0.7, but trainer.loss=grpo",
    "phases.rollout.top_k=5": "step 'rollout' samples with top_k=5, but trainer.loss=grpo learns",
    "trainer.length=27": (
        "step 'rollout' asks for 16 tokens (sampling.max_new_tokens, or its own option) after a "
        "prompt of 12, but trainer.length is 27; set trainer.length=28"
    ),
    "trainer.reward=null": "trainer.reward is null, but samples are rewarded; give one of even_ids",
    "pipeline_edit.remove=[rewarded,reward_rose]": (
        "pipeline: trainer.loss is 'grpo', so step 'train_step' needs rewarded samples of the engine's "
        "weights, but there are none; put 'rollout' and 'rewarded' before it"
    ),
    "pipeline_edit.remove=[rollout] repeat.first=rewarded": (
        "pipeline: step 'rewarded' needs the rollout of step 'rollout', but no step before it provides "
        "it; put step 'rollout' before it"
    ),
    "repeat.first=flush_cache": (
        "pipeline: trainer.loss is 'grpo', so step 'train_step#2' needs rewarded samples of the "
        "engine's weights, but there are none"
    ),
    "pipeline_edit.remove=[weights_synced]": (
        "pipeline: step 'policy_checked#2' requires trained weights that are not synced to the engine "
        "to be absent, but step 'train_step' created it; put 'weights_synced' between"
    ),
    "trainer.loss=seeded": "step 'policy_checked' scores samples, whose number and length are those",
    "pipeline=async_cycle trainer.loss=seeded": (
        "step 'policy_checked_paused' scores samples, whose number and length are those of a batch, but "
        "trainer.loss is 'seeded', which has none"
    ),
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_grpo_cannot_learn_from_is_refused(overrides: str) -> None:
    composed = compose_plain(GRPO, *overrides.split(" "))
    reported = refusal(lambda: checked_steps(config_of(composed)))
    assert reported.startswith(REFUSED[overrides])


def test_a_greedy_rollout_that_is_only_rewarded_is_none_of_its_business() -> None:
    overrides = ("phases.rollout_trained.temperature=0", "phases.rollout_trained.n=1")
    steps = checked_steps(config_of(compose_plain(GRPO, *overrides)))
    assert "rewarded_trained" in [item.step.step for item in steps]


def test_several_steps_may_learn_from_a_rollout_before_a_sync() -> None:
    again = (
        "pipeline_edit.after.train_step=train_step_again",
        "phases.train_step_again.use=train_step",
    )
    assert checked_steps(config_of(compose_plain(GRPO, *again)))


ASYNC = {
    "trainer.batch_size=16": (
        "trainer.batch_size is 16, but step 'rollout_paused' makes 32 samples (8 prompts, 4 of each); "
        "set trainer.batch_size=32"
    ),
    "trainer.length=28": (
        "step 'rollout_paused' asks for 16 tokens (sampling.max_new_tokens, or its own option) after a "
        "prompt of 36, but trainer.length is 28; set trainer.length=52"
    ),
    "phases.rollout_paused.pause_after_tokens=512": (
        "step 'rollout_paused' pauses after 512 tokens (pause_after_tokens), but its samples have at "
        "most 512 together (8 prompts, 4 of each, 16 tokens), and then none is half-way; it takes at "
        "most 511"
    ),
    "sampling.max_new_tokens=2": (
        "step 'rollout_paused' pauses after a step of decoding with samples half-way, but they have at "
        "most 2 tokens (sampling.max_new_tokens, or its own option); it needs at least 3"
    ),
}


@pytest.mark.parametrize("override", ASYNC)
def test_a_pause_that_cannot_come_or_a_batch_that_does_not_hold_its_samples_is_refused(
    override: str,
) -> None:
    composed = compose_plain("+experiment=tiny_async_cycle", override)
    config = config_of(composed)
    assert refusal(lambda: check_inputs(config, ordered(config), whole=False)) == ASYNC[override]
