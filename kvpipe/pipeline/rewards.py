"""Rewards: find the function that scores samples, call it, and compare each sample with its group.

A reward is ``reward(prompt, sample, **options)``, a finite number; ``options`` are those of
``trainer.reward_options``. It is one of kvpipe's, an entry point of the group ``kvpipe.rewards``, or a
function of one's own: of a file in a directory of ``phase_path``, or of a module that can be imported.
"""

import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvpipe.config.prompts import Prompt
from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError, PhaseError
from kvpipe.pipeline.rollout import LENGTH, Rollout, Sample
from kvpipe.records.run import Check
from kvpipe.suggest import nearest
from kvpipe.system import plugins

ENTRY_POINTS = "kvpipe.rewards"
_KEY = "trainer.reward"
_NONE = Sample("", 0, None, "", (), (), LENGTH, 0, 0, 0.0)
# Less than any spread that says something: a group of equal rewards has one from rounding alone.
_SPREAD = 1e-6
# More is no rounding, or the rewards of a group differ by little else.
_BALANCED = 1e-3


def even_ids(prompt: Prompt, sample: Sample) -> float:
    """Return the share of even token ids."""
    return sum(token % 2 == 0 for token in sample.token_ids) / max(1, len(sample.token_ids))


def length(prompt: Prompt, sample: Sample, target: int) -> float:
    """Return 1 for a sample of ``target`` tokens, down to 0 for one that is off by as many."""
    if target < 1:
        raise ValueError(f"target is {target}, it must be at least 1 token")
    return max(0.0, 1 - abs(len(sample.token_ids) - target) / target)


def regex(prompt: Prompt, sample: Sample, pattern: str) -> float:
    """Return 1 if the text has a match of ``pattern``, else 0."""
    return float(re.search(pattern, sample.text) is not None)


def exact_answer(prompt: Prompt, sample: Sample) -> float:
    """Return 1 if the text, without white space at its ends, is the prompt's answer, else 0."""
    if prompt.answer is None:
        raise ValueError("it has no 'answer' in prompts.file")
    return float(sample.text.strip() == prompt.answer)


SHIPPED: Mapping[str, Callable[..., float]] = {
    reward.__name__: reward for reward in (even_ids, length, regex, exact_answer)
}
"""kvpipe's own rewards by name."""


@dataclass(frozen=True)
class Reward:
    """The function that scores samples.

    Attributes:
        name: the value of ``trainer.reward``.
        function: the function.
        options: its keyword arguments.
        roots: the files or folders of its code.
        origin: origin of the code; None for one of kvpipe's.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    roots: Sequence[Path] = ()
    origin: plugins.Origin | None = None

    def of(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[float]:
        """Return the reward of each sample.

        Raises:
            PhaseError: the function raises, or returns what is no finite number; it names the sample.
        """
        by_id = {prompt.id: prompt for prompt in prompts}
        return [self._of(by_id[sample.prompt], sample) for sample in samples]

    def _of(self, prompt: Prompt, sample: Sample) -> float:
        try:
            value = float(self.function(prompt, sample, **self.options))
        except (Exception, SystemExit) as error:
            place = plugins.place_of(error, self.roots)
            raise PhaseError(
                f"{_KEY}={self.name}{place}: the reward of {sample.name} fails: "
                f"{plugins.reason_of(error)}"
            ) from error
        if not math.isfinite(value):
            raise PhaseError(
                f"{_KEY}={self.name}: the reward of {sample.name} is {value}, not a finite number"
            )
        return value


def reward_of(config: Kvpipe) -> Reward:
    """Return the reward that the config names.

    Raises:
        InputError: it names none, there is no such function, its code cannot be executed, or it does
            not take the options.
    """
    name = config.trainer.reward
    if name is None:
        raise InputError(
            f"{_KEY} is null, but samples are rewarded; give one of {', '.join(SHIPPED)}, or "
            "MODULE:FUNCTION of your own"
        )
    module, colon, function = name.partition(":")
    found = _of_module(name, module, function, config) if colon else _named(name, config)
    try:
        inspect.signature(found.function).bind(None, None, **found.options)
    except TypeError as error:
        raise InputError(
            f"{_KEY}={name}: it is called with a prompt, a sample and trainer.reward_options="
            f"{dict(found.options)}, but: {error}"
        ) from None
    return found


def origins(config: Kvpipe) -> dict[str, plugins.Origin]:
    """Return the reward that is not kvpipe's own, by its name, and where its code is.

    Raises:
        InputError: as of :func:`reward_of`.
    """
    name = config.trainer.reward
    found = reward_of(config).origin if name is not None else None
    return {str(name): found} if found else {}


def check(config: Kvpipe, prompts: Sequence[Prompt]) -> None:
    """Refuse a reward that cannot be called; one of kvpipe's is tried on an empty sample.

    Raises:
        InputError: as of :func:`reward_of`, or an option or a prompt is not what it needs.
    """
    reward = reward_of(config)
    if reward.origin is not None:
        return
    for prompt in prompts:
        try:
            reward.function(prompt, _NONE, **reward.options)
        except (TypeError, ValueError, re.error) as error:
            raise InputError(f"{_KEY}={reward.name}: prompt {prompt.id!r}: {error}") from None


def _named(name: str, config: Kvpipe) -> Reward:
    """Return a reward of kvpipe's or of an installed package."""
    options, points = config.trainer.reward_options, plugins.installed(ENTRY_POINTS)
    if name in points:
        point = plugins.only(points[name])
        function = plugins.load(point)
        module = point.module
        return _own(name, function, options, plugins.described(point), plugins.roots(module))
    if name not in SHIPPED:
        raise InputError(
            f"{_KEY} is {name!r}; {nearest(name, [*SHIPPED, *points])}; a function of your own is "
            "MODULE:FUNCTION"
        )
    return Reward(name, SHIPPED[name], options)


def _of_module(name: str, module: str, function: str, config: Kvpipe) -> Reward:
    """Return a function of a file in a directory of ``phase_path``, or of a module."""
    files = [Path.cwd() / folder / f"{module}.py" for folder in config.phase_path]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        mark = hashlib.sha256(bytes(file)).hexdigest()[:8]
        loaded: Any = plugins.load_file(file, str(file), f"kvpipe_reward_{file.stem}_{mark}")
        where, roots = str(file), [file]
    else:
        where, roots = f"module {module}", plugins.roots(module)
        if not roots:
            raise InputError(
                f"{_KEY} is {name!r}, but no directory of phase_path has a {module}.py, and no module "
                f"{module!r} can be imported"
            )
        with plugins.blamed_on(f"{_KEY}={name}", roots):
            loaded = importlib.import_module(module)
    if not inspect.isfunction(getattr(loaded, function, None)):
        there = [n for n, value in vars(loaded).items() if inspect.isfunction(value)]
        raise InputError(
            f"{_KEY} is {name!r}, but {where} has no function {function!r}; {nearest(function, there)}"
        )
    return _own(name, getattr(loaded, function), config.trainer.reward_options, where, roots)


def _own(
    name: str, function: Any, options: Mapping[str, Any], where: str, roots: Sequence[Path]
) -> Reward:
    if not inspect.isfunction(function):
        raise InputError(f"{_KEY}={name}: {where} is {function!r}, not a function")
    return Reward(name, function, options, roots, plugins.origin_of(where, function))


@dataclass(frozen=True)
class Rewarded:
    """The samples of a rollout with their rewards.

    Attributes:
        rollout: the rollout.
        rewards: the reward of each sample.
    """

    rollout: Rollout
    rewards: Sequence[float]

    @cached_property
    def advantages(self) -> list[float]:
        """Advantage of each sample over its group, the samples of the same prompt.

        The reward minus the group's mean, divided by its standard deviation (of n - 1).
        """
        known = {name: _mean_and_spread(rewards) for name, rewards in self._groups.items()}
        found = []
        for sample, reward in zip(self.rollout.samples, self.rewards, strict=True):
            mean, spread = known[sample.prompt]
            found.append((reward - mean) / (spread + _SPREAD))
        return found

    @property
    def balanced(self) -> Check:
        """The check that the advantages of each group add up to 0, so each is relative to its group."""
        sums = dict.fromkeys(self._groups, 0.0)
        for sample, advantage in zip(self.rollout.samples, self.advantages, strict=True):
            sums[sample.prompt] += advantage
        off = [prompt for prompt, total in sums.items() if abs(total) > _BALANCED]
        detail = f"those of prompt {off[0]!r} add up to {sums[off[0]]:g}, not to 0" if off else ""
        right = len(sums) - len(off)
        return Check("advantages_balanced", len(sums), right, not off, detail)

    @property
    def mean(self) -> float:
        """The mean reward."""
        return _mean_and_spread(self.rewards)[0]

    @property
    def numbers(self) -> dict[str, float]:
        """Mean and spread of the rewards, for records."""
        mean, spread = _mean_and_spread(self.rewards)
        return {"reward_mean": mean, "reward_spread": spread}

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the phase's record."""
        groups = self._groups.values()
        return {
            **self.numbers,
            "reward_least": min(self.rewards),
            "reward_most": max(self.rewards),
            "groups": len(groups),
            # Nothing is learnt from them.
            "equal_groups": sum(min(group) == max(group) for group in groups),
        }

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the phase's file, one a sample."""
        each = zip(self.rollout.samples, self.rewards, self.advantages, strict=True)
        return [
            {
                "prompt": sample.prompt,
                "index": sample.index,
                "reward": reward,
                "advantage": advantage,
                "text": sample.text,
            }
            for sample, reward, advantage in each
        ]

    @cached_property
    def _groups(self) -> dict[str, list[float]]:
        """The rewards of each prompt's samples."""
        groups: dict[str, list[float]] = {}
        for sample, reward in zip(self.rollout.samples, self.rewards, strict=True):
            groups.setdefault(sample.prompt, []).append(reward)
        return groups


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation of a sample; one value alone has none."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / max(1, len(values) - 1))
