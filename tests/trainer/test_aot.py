"""The trainer's programs compiled for a TPU on a machine that has none: real libtpu, a tiny model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import TrainerConfig
from tests.conftest import engine_config

TARGET = "v5e:2x2x1"


@pytest.fixture(scope="module")
def model_dir(model_cache: Path) -> Path:
    return ensure(TinyModel(num_hidden_layers=1, vocab_size=320), model_cache)


@pytest.mark.nightly(finds="a training step or a sync that does not compile for a TPU")
def test_step_and_sync_compile_and_come_from_the_cache_the_next_time(
    four_devices: None, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine.aot import Place
    from kvpipe.trainer import aot

    def compiled(engine: Any, **options: Any) -> Any:
        place = Place(engine, model_dir, TARGET, tmp_path, compiles=True)
        return aot.compiled(place, TrainerConfig(**options))

    engine = engine_config()
    step, sync = compiled(engine)
    assert [step.name, sync.name] == ["train_step", "weight_sync"]
    assert {program.requests + program.tokens for program in (step, sync)} == {0}
    assert step.code_bytes > 100_000
    assert sync.code_bytes > 0
    assert (step.in_place_bytes > 1 << 20, sync.in_place_bytes) == (True, 0)

    asked: list[Any] = []
    monkeypatch.setattr(aot, "compile_programs", lambda *args: asked.append(args) or ())
    assert compiled(replace(engine, max_total_tokens=512, page_size=16)) == (step, sync)
    assert asked == []
    compiled(engine, dtype="bfloat16")
    compiled(replace(engine, dtype="float32"))
    assert len(asked) == 2


def test_a_program_that_does_not_compile_is_a_finding_of_the_target(
    four_devices: None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.errors import JaxRuntimeError

    from kvpipe.engine.aot import CompileFinding, Place
    from kvpipe.trainer import aot

    def refuse(*args: Any) -> None:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: it takes more than there is")

    monkeypatch.setattr(aot, "compile_step", refuse)
    with pytest.raises(CompileFinding, match=f"not compile for {TARGET}: RESOURCE_EXHAUSTED: it"):
        place = Place(engine_config(), model_dir, TARGET, Path(), compiles=True)
        aot.compile_programs(place, TrainerConfig())
