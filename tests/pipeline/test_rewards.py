"""Rewards: kvpipe's, those of one's own and of packages, what is wrong with one, and the groups."""

import statistics
import sys
from dataclasses import replace
from typing import Any

import pytest

from kvpipe.config.prompts import Prompt
from kvpipe.config.schema import Kvpipe, TrainerConfig
from kvpipe.errors import PhaseError
from kvpipe.pipeline.rewards import Rewarded, check, origins, reward_of
from kvpipe.pipeline.rollout import Rollout, Sample
from kvpipe.system import plugins
from tests.installed_package import install
from tests.refusal import refusal

PROMPTS = [Prompt("sum", "3 + 5 =", answer="8"), Prompt("other", "1 + 1 =", answer="2")]
SAMPLE = Sample("sum", 1, 7, " 8\n", (4, 6, 7, 8), (-0.5,) * 4, "length", 3, 0, 0.1)


def config(reward: str | None, path: Any = (), **options: Any) -> Kvpipe:
    trainer = TrainerConfig(reward=reward, reward_options=options)
    return Kvpipe(trainer=trainer, phase_path=[str(path)] if path else [])


def rewarded(reward: str, path: Any = (), **options: Any) -> float:
    (value,) = reward_of(config(reward, path, **options)).of(PROMPTS, [SAMPLE])
    return value


@pytest.mark.parametrize(
    ("reward", "options", "value"),
    [
        ("even_ids", {}, 0.75),
        ("length", {"target": 4}, 1.0),
        ("length", {"target": 16}, 0.25),
        ("length", {"target": 1}, 0.0),
        ("regex", {"pattern": r"^\s*\d"}, 1.0),
        ("regex", {"pattern": "nine"}, 0.0),
        ("exact_answer", {}, 1.0),
    ],
)
def test_a_shipped_reward_scores_a_sample(reward: str, options: Any, value: float) -> None:
    assert rewarded(reward, **options) == value
    assert origins(config(reward, **options)) == {}


def test_an_answer_that_only_begins_with_the_right_one_is_wrong() -> None:
    reward = reward_of(config("exact_answer"))
    assert reward.of(PROMPTS, [replace(SAMPLE, text="8 or 9")]) == [0.0]


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (None, {}, "trainer.reward is null, but samples are rewarded; give one of even_ids, "),
        ("even", {}, "trainer.reward is 'even'; did you mean 'even_ids'?"),
        ("length", {}, "trainer.reward=length: it is called with a prompt, a sample and "),
        ("length", {"target": 0}, "trainer.reward=length: prompt 'sum': target is 0"),
        ("length", {"target": "4"}, "trainer.reward=length: prompt 'sum': '<' not supported"),
        ("regex", {"pattern": "("}, "trainer.reward=regex: prompt 'sum': missing ), unterminated"),
        ("nosuch:f", {}, "trainer.reward is 'nosuch:f', but no directory of phase_path has a "),
        ("json:load_", {}, "trainer.reward is 'json:load_', but module json has no function "),
    ],
)
def test_what_cannot_be_called_is_refused(reward: Any, options: Any, message: str) -> None:
    assert refusal(check, config(reward, **options), PROMPTS).startswith(message)


def test_a_prompt_without_an_answer_is_refused_for_the_reward_that_needs_one() -> None:
    prompts = [*PROMPTS, Prompt("third", "?")]
    assert refusal(check, config("exact_answer"), prompts) == (
        "trainer.reward=exact_answer: prompt 'third': it has no 'answer' in prompts.file"
    )
    check(config("even_ids"), prompts)


def test_a_function_of_a_file_in_phase_path_scores_and_its_origin_is_known(tmp_path: Any) -> None:
    (tmp_path / "_mine.py").write_text(
        "def brief(prompt, sample, weight=1):\n    return weight / len(sample.token_ids)\n"
    )
    assert rewarded("_mine:brief", tmp_path, weight=2) == 0.5
    ((name, origin),) = origins(config("_mine:brief", tmp_path)).items()
    assert name == "_mine:brief" and str(origin).startswith(f"{tmp_path / '_mine.py'} (sha256 ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def brief(:\n", ", line 1: SyntaxError: "),
        ("import nosuch\n", ", line 1: ModuleNotFoundError: No module named 'nosuch'"),
        ("import sys\nsys.exit(0)\n", ", line 2: SystemExit: 0"),
    ],
)
def test_a_file_that_cannot_be_executed_is_refused_with_its_line(
    tmp_path: Any, source: str, message: str
) -> None:
    (tmp_path / "_bad.py").write_text(source)
    reported = refusal(check, config("_bad:brief", tmp_path), PROMPTS)
    assert reported.startswith(f"{tmp_path / '_bad.py'}{message}")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return 1 / sample.index - 1 / (sample.index - 1)", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("return 'good'", "ValueError: could not convert string to float: 'good'"),
        ("return None", "TypeError: float() argument must be"),
        ("return float('nan')", "is nan, not a finite number"),
        ("return 1e400", "is inf, not a finite number"),
    ],
)
def test_a_reward_that_fails_or_is_not_finite_names_its_sample(
    tmp_path: Any, body: str, why: str
) -> None:
    (tmp_path / "_bad.py").write_text(f"def score(prompt, sample):\n    {body}\n")
    reward = reward_of(config("_bad:score", tmp_path))
    with pytest.raises(PhaseError) as caught:
        reward.of(PROMPTS, [SAMPLE])
    assert "the reward of sample 1 of prompt 'sum' " in str(caught.value)
    assert why in str(caught.value)
    assert str(caught.value).startswith("trainer.reward=_bad:score")


def test_a_reward_of_a_package_is_found_by_its_name(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "LEAST = 3\n\ndef brief(prompt, sample):\n    return len(sample.token_ids) - LEAST\n"
    points = {"brief": "acme_rewards:brief", "least": "acme_rewards:LEAST"}
    install(tmp_path, "acme", {"acme_rewards.py": source}, rewards=points)
    plugins.installed.cache_clear()
    try:
        assert rewarded("brief") == rewarded("acme_rewards:brief") == 1.0
        assert str(origins(config("brief"))["brief"]).startswith("acme 2.1, acme_rewards:brief (")
        assert refusal(check, config("least"), PROMPTS) == (
            "trainer.reward=least: acme 2.1, acme_rewards:LEAST is 3, not a function"
        )
    finally:
        plugins.installed.cache_clear()
        sys.modules.pop("acme_rewards", None)


def rewarded_samples(**by_prompt: list[float]) -> Rewarded:
    """Return rewarded samples of these prompts."""
    samples = [
        replace(SAMPLE, prompt=prompt, index=index)
        for prompt, rewards in by_prompt.items()
        for index in range(len(rewards))
    ]
    rewards = [reward for rewards in by_prompt.values() for reward in rewards]
    return Rewarded(Rollout(samples, 1.0, 4, None, ()), rewards)


def test_advantages_are_normalised_within_the_samples_of_a_prompt() -> None:
    low, high, equal = [0.0, 0.1, 0.5], [5.0, 9.0, 7.5], [0.1, 0.1, 0.1]
    found = rewarded_samples(low=low, high=high, equal=equal)
    wanted = [
        (reward - statistics.mean(group)) / statistics.stdev(group)
        for group in (low, high)
        for reward in group
    ]
    assert found.advantages[:6] == pytest.approx(wanted, rel=1e-4)
    assert found.advantages[6:] == pytest.approx([0, 0, 0], abs=1e-9)
    assert (found.balanced.expected, found.balanced.actual, found.balanced.passed) == (3, 3, True)


def test_advantages_over_all_prompts_are_not_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    low_and_high = [-1.5, -0.5, 0.5, 1.5]
    monkeypatch.setattr(Rewarded, "advantages", low_and_high)
    check = rewarded_samples(low=[0.0, 1.0], high=[2.0, 3.0]).balanced
    assert (check.expected, check.actual, check.passed) == (2, 0, False)
    assert check.detail == "those of prompt 'low' add up to -2, not to 0"


def test_the_record_has_mean_and_spread_and_the_file_a_line_for_each_sample() -> None:
    found = rewarded_samples(low=[0.0, 1.0], high=[3.0, 3.0])
    assert found.fields == {
        "reward_mean": 1.75,
        "reward_spread": statistics.stdev([0, 1, 3, 3]),
        "reward_least": 0.0,
        "reward_most": 3.0,
        "groups": 2,
        "equal_groups": 1,
    }
    assert [(line["prompt"], line["index"], line["reward"]) for line in found.lines] == [
        ("low", 0, 0.0),
        ("low", 1, 1.0),
        ("high", 0, 3.0),
        ("high", 1, 3.0),
    ]
    assert [line["advantage"] for line in found.lines] == found.advantages
