"""Both starts of a model of 1.5 billion parameters; it takes minutes and 8 GB, so it is run by name.

make bench ARGS=start_large
"""

import tempfile

from benchmarks.start import medians_of_starts

MODEL = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
}


def measure() -> dict[str, float]:
    """Return the figures of one turn."""
    model = [f"model.generate.{key}={value}" for key, value in MODEL.items()]
    with tempfile.TemporaryDirectory() as cwd:
        return medians_of_starts("start_large", cwd, 1, *model, "sampling.max_new_tokens=4")
