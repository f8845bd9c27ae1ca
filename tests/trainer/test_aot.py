"""The trainer's programs compiled for a TPU on a machine that has none: real libtpu, a tiny model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import TrainerConfig
from tests.conftest import engine_config

pytestmark = pytest.mark.early

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
    made = compiled(engine)
    gradients, step, sync = made
    assert [each.name for each in made] == ["gradients", "train_step", "weight_sync"]
    assert {program.requests + program.tokens for program in made} == {0}
    assert min(step.code_bytes, gradients.code_bytes) > 50_000
    assert sync.code_bytes > 0
    # AdamW's two moments and the gradients are of the parameters' size.
    assert step.in_place_bytes > 3 * gradients.in_place_bytes > 1 << 20
    assert sync.in_place_bytes == 0

    asked: list[str] = []
    monkeypatch.setattr(
        aot, "compile_gradient_program", lambda *_: asked.append("gradients") or gradients
    )
    monkeypatch.setattr(aot, "compile_programs", lambda *_: asked.append("others") or (step, sync))
    assert compiled(replace(engine, max_total_tokens=512, page_size=16)) == made
    assert compiled(engine, seed=1, batch_size=16, micro_batch_size=8, data="other") == made
    assert asked == []
    compiled(engine, micro_batch_size=2)
    compiled(engine, clip_norm=1.0)
    assert asked == ["gradients", "others"]
    compiled(engine, dtype="bfloat16")
    compiled(replace(engine, dtype="float32"))
    assert len(asked) == 6


@pytest.mark.nightly(finds="a gradient program that does not fit a TPU because of its code")
def test_equal_layers_share_code_on_a_tpu(
    four_devices: None, model_cache: Path, tmp_path: Path
) -> None:
    """Without sharing, four layers take 3.5 times the code of one."""
    from kvpipe.engine.aot import Place
    from kvpipe.trainer import aot

    def code_bytes(layers: int) -> int:
        model_dir = ensure(TinyModel(num_hidden_layers=layers, vocab_size=320), model_cache)
        place = Place(engine_config(), model_dir, TARGET, tmp_path, compiles=True)
        config = TrainerConfig(loss="sft", data="unread", batch_size=1, length=128)
        return aot.compile_gradient_program(place, config).code_bytes

    one, four = code_bytes(1), code_bytes(4)
    assert four < 3 * one


def test_a_program_that_does_not_compile_is_a_finding_of_the_target(
    four_devices: None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.errors import JaxRuntimeError

    from kvpipe.engine.aot import CompileFinding, Place
    from kvpipe.trainer import aot

    def refuse(*args: Any) -> None:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: it takes more than there is")

    for name, compiles in (
        ("compile_update", aot.compile_programs),
        ("compile_gradients", aot.compile_gradient_program),
    ):
        monkeypatch.setattr(aot, name, refuse)
        with pytest.raises(
            CompileFinding, match=f"not compile for {TARGET}: RESOURCE_EXHAUSTED: it"
        ):
            place = Place(engine_config(), model_dir, TARGET, Path(), compiles=True)
            compiles(place, TrainerConfig())


def test_gradients_that_are_not_written_into_the_old_ones_are_a_finding(
    four_devices: None, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine.aot import CompileFinding, Place
    from kvpipe.trainer import aot

    copying = SimpleNamespace(copied_bytes=1000, used=[], temp_bytes=0)
    monkeypatch.setattr(aot, "compile_gradients", lambda *_: copying)
    place = Place(engine_config(), model_dir, "cpu", Path(), compiles=True)
    with pytest.raises(CompileFinding, match="the program gradients is not in place on cpu: of"):
        aot.compile_gradient_program(place, TrainerConfig())
