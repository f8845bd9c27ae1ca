"""Any model that the engine has: tied and untied, with 1, 2 and 8 KV heads, in float32 at tp 4."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import ensure
from tests.conftest import StartEngine, greedy
from tests.golden.answers import NAMES, comparable, golden, spec

# An untied head is made without a dtype in 0.0.2: a dummy engine has it in bfloat16.
COMPARED = {
    "tiny_float32": 64,
    "qwen2_untied_float32": 31,
    "qwen3_float32": 33,
    "llama_float32": 24,
}
ONE_WRONG = pytest.mark.nightly(finds="weights of a rarer model that kvpipe alone misplaces")


def values(engine: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return each parameter on the host, by path."""
    from kvpipe.engine import weights

    return {path: np.array(leaf) for path, leaf in weights.parameters(engine).items()}


def other_leaves(found: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Return the paths whose bits differ once ``own`` has the dtype of ``found``."""
    assert found.keys() == own.keys()
    return [
        path
        for path, leaf in found.items()
        if own[path].astype(leaf.dtype).tobytes() != leaf.tobytes()
    ]


@pytest.mark.parametrize(
    "name",
    [*NAMES[:2], *(pytest.param(name, marks=ONE_WRONG) for name in NAMES[2:])],
)
def test_streamed_weights_are_those_of_the_engines_own_loader_bit_for_bit(
    start_engine: StartEngine, model_cache: Path, name: str
) -> None:
    from kvpipe.engine import weights

    model_dir = ensure(spec(name), model_cache)
    with start_engine(model_dir, dtype="float32", load_format="auto") as loaded:
        own = values(loaded)
    with start_engine(model_dir, dtype="float32") as streamed:
        dummy = values(streamed)
        weights.stream(streamed, open_checkpoint(model_dir))
        found = values(streamed)
    assert other_leaves(found, own) == []
    assert len(other_leaves(dummy, own)) > 20


# In the first tier tests/engine/test_empty_start.py compares the ids of the tiny model.
@pytest.mark.nightly(finds="weights that kvpipe and the engine's own loader misplace")
@pytest.mark.parametrize("name", NAMES)
def test_streamed_weights_give_the_ids_of_transformers(
    start_engine: StartEngine, model_cache: Path, name: str
) -> None:
    from kvpipe.engine import weights

    model_dir = ensure(spec(name), model_cache)
    with start_engine(model_dir, dtype="float32") as streamed:
        weights.stream(streamed, open_checkpoint(model_dir))
        for answer in golden(name)["answers"]:
            expected = comparable(answer)[: COMPARED[name]]
            assert len(expected) >= (32 if name == "tiny_float32" else 16)
            output = streamed.generate(answer["prompt"], greedy(len(expected)))
            assert output.prompt_tokens == len(answer["prompt_ids"])
            assert list(output.token_ids) == expected
