"""A plan is made once for the same input, and again after any change of what it is made from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpipe.checkpoints.model_dir import shape_dir
from kvpipe.parent import plan_cache
from kvpipe.plan.targets import Target
from tests.helpers_config import compose_plain, config_of
from tests.report.test_plan import PLAN

TARGET = Target("cpu", 2, 10**9)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvpipe"


def made(tmp_path: Path, *overrides: str, target: Target = TARGET, compiles: str = "") -> int:
    """Return how often a plan was made; making it may compile a program of this name."""
    plain, calls = compose_plain(*overrides), []
    config = config_of(plain)

    def make() -> Any:
        calls.append(plain)
        if compiles:
            (tmp_path / "kvpipe" / "programs").mkdir(parents=True)
            (tmp_path / "kvpipe" / "programs" / f"{compiles}.json").touch()
        return PLAN

    found = plan_cache.kept(config, plain, target, shape_dir(config, tmp_path), make)
    assert found == PLAN
    return len(calls)


def test_an_unchanged_config_is_planned_once_also_if_that_compiles_and_under_another_name(
    cache: Path, tmp_path: Path
) -> None:
    assert made(tmp_path, compiles="decode") == 1
    assert made(tmp_path) == 0
    assert made(tmp_path, "label=other", "plan.format=json", "tracking.mode=online") == 0
    assert len(list((cache / "plans").iterdir())) == 1


@pytest.mark.parametrize(
    "override",
    [
        "engine.max_total_tokens=4096",
        "plan.compile=false",
        "model.generate.num_hidden_layers=2",
        "sampling.max_new_tokens=3",
        "prompt.text=" + "word" * 100,
    ],
)
def test_a_change_of_the_config_is_planned_anew(cache: Path, tmp_path: Path, override: str) -> None:
    assert [made(tmp_path), made(tmp_path, override), made(tmp_path)] == [1, 1, 0]


def test_another_target_a_new_program_and_another_source_are_planned_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made(tmp_path) == 1
    assert made(tmp_path, target=replace(TARGET, hbm_bytes=10**8)) == 1
    (cache / "programs").mkdir()
    (cache / "programs" / "decode.json").touch()
    assert [made(tmp_path), made(tmp_path)] == [1, 0]
    monkeypatch.setattr(plan_cache, "_source", lambda: "changed")
    assert made(tmp_path) == 1


def test_a_changed_prompt_file_is_planned_anew(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    overrides = ("prompt.text=null", f"prompt.file={file}")
    file.write_text("short")
    assert [made(tmp_path, *overrides), made(tmp_path, *overrides)] == [1, 0]
    file.write_text("long " * 50)
    assert made(tmp_path, *overrides) == 1


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"phase": "run_planned", "new": 1}'])
def test_a_damaged_plan_is_made_again(cache: Path, tmp_path: Path, content: str) -> None:
    made(tmp_path)
    (file,) = (cache / "plans").iterdir()
    file.write_text(content)
    assert [made(tmp_path), made(tmp_path)] == [1, 0]


def test_where_no_cache_can_be_a_plan_is_made_each_time(cache: Path, tmp_path: Path) -> None:
    cache.touch()  # a file
    assert [made(tmp_path), made(tmp_path)] == [1, 1]
