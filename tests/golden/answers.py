"""The golden answers: what Hugging Face transformers says that a tiny model answers in float32."""

import json
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.tiny import TinyModel

NEAR_TIE = 0.1
NAMES = ("tiny_float32", "qwen2_untied_float32", "qwen3_float32", "llama_float32")


def golden(name: str) -> dict[str, Any]:
    """Return the content of ``tests/golden/<name>.json``."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def spec(name: str) -> TinyModel:
    """Return the model that the answers are of."""
    return TinyModel(**golden(name)["spec"])


def comparable(answer: dict[str, Any]) -> list[int]:
    """Return the ids up to the first step whose best two logits nearly tie."""
    ties = [step for step, gap in enumerate(answer["gaps"]) if gap < NEAR_TIE]
    return answer["output_ids"][: ties[0]] if ties else answer["output_ids"]
