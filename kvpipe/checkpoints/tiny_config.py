"""The config.json of a generated model, without numpy: a check and a plan need nothing else of it."""

from dataclasses import asdict
from typing import Any

from kvpipe.config.schema import ARCHITECTURES, TinyModel


def config_json(spec: TinyModel) -> dict[str, Any]:
    """Return the content of `config.json`, the only part of the model that a plan needs."""
    config: dict[str, Any] = {
        "architectures": [spec.architecture],
        "model_type": ARCHITECTURES[spec.architecture],
        **{
            key: value for key, value in asdict(spec).items() if key not in ("seed", "architecture")
        },
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": spec.vocab_size - 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "use_cache": True,
    }
    if spec.architecture == "Qwen2ForCausalLM":
        config |= {"use_sliding_window": False, "max_window_layers": spec.num_hidden_layers}
    else:
        config |= {"attention_bias": False, "rope_scaling": None}
    return config
