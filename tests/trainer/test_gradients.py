"""The gradients of a loss, through the engine's own model: held against those of transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import TrainerConfig
from tests.conftest import engine_config
from tests.golden import sketch
from tests.golden.answers import NAMES, spec

pytestmark = pytest.mark.early

GOLDEN = Path(sketch.__file__).parent
# 0.0.2 has an untied head in bfloat16, whatever the engine's dtype is, and so the logits too.
ROUNDED_HEAD = ("qwen2_untied_float32", "llama_float32")
OTHER_MODELS = pytest.mark.nightly(finds="a wrong gradient of a model that is not a tied Qwen2")


def learner(model_dir: Path, **options: Any) -> Any:
    """Return the shapes, the forward pass and the trainer's layout of a model at tp 4."""
    from kvpipe.engine import compat, shapes, training
    from kvpipe.engine.forward import Forward
    from kvpipe.trainer.gradients import Learned
    from kvpipe.trainer.layout import lay_out

    config = TrainerConfig(loss="sft", **options)
    mesh = compat.device_mesh(4)
    found = shapes.of_mesh(engine_config(dtype="float32"), model_dir, mesh, "cpu")
    layout = lay_out(training.source_shapes(found.sources, found.params), mesh, config)
    return layout, Learned.compiled(layout, config, Forward.of_shapes(found)), config


@pytest.mark.parametrize(
    "name", ["tiny_float32", *(pytest.param(name, marks=OTHER_MODELS) for name in NAMES[1:])]
)
def test_loss_and_gradient_of_every_leaf_are_those_of_transformers(
    four_devices: None, model_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two sequences of two lengths, each a micro-batch, in several chunks of which the last is padded."""
    from functools import partial

    import jax.numpy as jnp
    from sgl_jax.srt.models import llama, qwen2

    from kvpipe.engine import forward, memory, transfer
    from kvpipe.trainer.batch import Example, batch_of

    monkeypatch.setattr(forward, "_QUERIES", 40)
    monkeypatch.setattr(forward, "_TOKENS", 36)
    if name in ROUNDED_HEAD:
        for module in (llama, qwen2):
            head = partial(module.ParallelLMHead, param_dtype=jnp.float32)
            monkeypatch.setattr(module, "ParallelLMHead", head)
    model_dir = ensure(spec(name), model_cache)
    layout, gradients, config = learner(model_dir, batch_size=2, micro_batch_size=1, length=96)
    golden = json.loads((GOLDEN / f"{name}_gradients.json").read_text(encoding="utf-8"))
    examples = [Example(s["prompt_ids"], s["new_ids"]) for s in golden["sequences"]]
    weights = open_checkpoint(model_dir)
    params = {n: transfer.begin(weights[n], like).wait() for n, like in layout.params.items()}
    last = dict(
        zip(layout.gradients, transfer.zeros(tuple(layout.gradients.values())), strict=True)
    )

    found, numbers = gradients(params, last, 0, batch_of(examples, config))

    assert numbers["loss"] == pytest.approx(golden["loss"], rel=1e-5)
    off = {
        leaf: sketch.norm_of_difference(sketch.sketch(leaf, found[leaf]), wanted["sketch"])
        / wanted["norm"]
        for leaf, wanted in golden["gradients"].items()
    }
    assert found.keys() == off.keys()
    assert max(off.values()) <= 1e-4, max(off, key=off.__getitem__)
    (used,) = gradients.used
    assert used.alias_size_in_bytes == memory.bytes_of(layout.gradients.values())[0]
    assert gradients.copied_bytes == 0


@pytest.mark.nightly(finds="memory of a step that grows with the square of the length")
def test_temporaries_grow_no_faster_than_the_length(four_devices: None, model_cache: Path) -> None:
    model_dir = ensure(TinyModel(num_hidden_layers=1, vocab_size=320), model_cache)
    held = [
        learner(model_dir, batch_size=1, length=length)[1].temp_bytes
        for length in (1024, 2048, 4096)
    ]
    shorter, longer = np.diff(held)
    assert 0 < longer <= 2.1 * shorter
