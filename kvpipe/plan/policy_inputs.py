"""Check before a start the samples that a policy learns from: rollouts, groups and rewards."""

from collections.abc import Iterator, Sequence

from kvpipe.config.prompts import read_prompts
from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline import facts, rewards
from kvpipe.pipeline.facts import SAMPLES_REWARDED
from kvpipe.pipeline.ledger import POLICY_SCORES
from kvpipe.pipeline.sampled import SampledPhase
from kvpipe.plan.fold import PlannedStep
from kvpipe.units import counted


def check_policy(config: Kvpipe, planned: Sequence[PlannedStep]) -> None:
    """Refuse a reward, rollout or batch that ``trainer.loss=grpo`` cannot learn from.

    Raises:
        InputError: naming what is wrong.
    """
    if any(SAMPLES_REWARDED in item.effect.adds for item in planned):
        rewards.check(config, read_prompts(config.prompts))
    elif config.trainer.reward is not None:
        rewards.check(config, ())
    if not config.trainer.rewarded:
        for scoring, rolled_out in scored(planned):
            if not config.trainer.learns:
                raise InputError(
                    f"step {scoring.step.step!r} scores samples, whose number and length are those of "
                    f"a batch, but trainer.loss is {config.trainer.loss!r}, which has none"
                )
            _check_batch(config, rolled_out)
        return
    before: frozenset[str] = frozenset()
    learnt_from: PlannedStep | None = None
    by_name = {item.step.step: item for item in planned}
    for item in planned:
        if SAMPLES_REWARDED in item.effect.adds:
            learnt_from = next((by_name[name] for name in _rolled_out(item)), None)
        if facts.trained(item.step.step) in item.effect.adds:
            if SAMPLES_REWARDED not in before or learnt_from is None:
                raise InputError(_no_samples(item.step.step))
            check_group(config, learnt_from)
        before = item.facts


def check_group(config: Kvpipe, item: PlannedStep) -> None:
    """Refuse a rollout whose samples are not a batch of groups that were sampled from the policy.

    Raises:
        InputError: naming the step and the key.
    """
    step, each = item.step, item.effect.samples
    if each < 2:
        raise InputError(
            f"step {step.step!r} makes {counted(each, 'sample')} of each prompt (sampling.n, or its "
            "own option), but trainer.loss=grpo compares the samples of a prompt: it needs at least 2"
        )
    assert isinstance(step, SampledPhase), "only a sampled phase rolls out"
    for name, whole in (("temperature", 1.0), ("top_p", 1.0), ("top_k", None), ("min_p", 0.0)):
        if (value := getattr(step, name)) != whole:
            right = "null" if whole is None else f"{whole:g}"
            raise InputError(
                f"step {step.step!r} samples with {name}={value:g}, but trainer.loss=grpo learns by "
                "the probabilities at temperature 1 over the whole vocabulary; set "
                f"sampling.{name}={right}"
            )
    _check_batch(config, item)


def scored(planned: Sequence[PlannedStep]) -> Iterator[tuple[PlannedStep, PlannedStep]]:
    """Yield each step that scores samples, with the step that began their rollout.

    One that began in a part of the run before these steps is left out: that part has checked it.
    """
    rolled_out: dict[str, PlannedStep] = {}
    last: PlannedStep | None = None
    for item in planned:
        last = item if item.effect.rolls_out else last
        if last is not None and facts.rollout(item.step.step) in item.effect.adds:
            rolled_out[item.step.step] = last
        if POLICY_SCORES in item.effect.runs:
            of = next(_rolled_out(item), None)
            if began := last if of is None else rolled_out.get(of):
                yield item, began


def _check_batch(config: Kvpipe, item: PlannedStep) -> None:
    """Refuse a rollout whose samples are not as many as the examples of a batch."""
    step, each = item.step, item.effect.samples
    prompts = len(read_prompts(config.prompts))
    if (total := prompts * each) != config.trainer.batch_size:
        raise InputError(
            f"trainer.batch_size is {config.trainer.batch_size}, but step {step.step!r} makes "
            f"{total} samples ({counted(prompts, 'prompt')}, {each} of each); set "
            f"trainer.batch_size={total}"
        )


def _rolled_out(item: PlannedStep) -> Iterator[str]:
    """Yield the names of the steps whose rollouts a step needs; the paused one has none."""
    prefix = facts.rollout("")
    return (f.removeprefix(prefix) for f in item.effect.needs if f.startswith(prefix))


def _no_samples(step: str) -> str:
    means = facts.meaning(SAMPLES_REWARDED)
    return (
        f"pipeline: trainer.loss is 'grpo', so step {step!r} needs {means.what}, but there are none; "
        f"{means.if_missing}"
    )
