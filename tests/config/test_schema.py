import pytest

from kvpipe.config.schema import EngineConfig, Kvpipe, SamplingConfig, TinyModel, from_plain
from tests.helpers_config import compose_plain
from tests.refusal import refusal


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("device", "gpu", "engine.device is 'gpu'; did you mean 'tpu' or 'cpu'?"),
        ("device", "CUDA", "engine.device is 'CUDA'; valid are: cpu, tpu"),
        ("dtype", "bf16", "engine.dtype is 'bf16'; did you mean 'bfloat16'?"),
        ("load_format", "real", "engine.load_format is 'real'; valid are: auto, dummy"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(key, value, message):
    assert refusal(EngineConfig, **{key: value}) == message


@pytest.mark.parametrize(
    "key",
    [
        "virtual_devices",
        "tp_size",
        "dp_size",
        "max_total_tokens",
        "context_length",
        "page_size",
        "max_running_requests",
        "max_prefill_tokens",
    ],
)
def test_a_size_of_the_engine_below_one_is_refused(key):
    """A tp_size of 0 used to be taken for none, and so for the device count."""
    assert refusal(EngineConfig, **{key: 0}) == f"engine.{key} is 0, it must be at least 1"
    assert getattr(EngineConfig(**{key: 1}), key) == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"architecture": "Qwen2ForCausal"},
            "architecture is 'Qwen2ForCausal'; did you mean 'Qwen2ForCausalLM' or "
            "'Qwen3ForCausalLM' or 'LlamaForCausalLM'?",
        ),
        ({"torch_dtype": "bf16"}, "torch_dtype is 'bf16'; did you mean 'bfloat16' or 'float16'?"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be at least 1"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4, it must be a multiple of num_key_value_heads (3)",
        ),
        ({"head_dim": 7}, "head_dim is 7, it must be even for RoPE"),
        (
            {"vocab_size": 256},
            "vocab_size is 256, it must be more than 256: one token for each byte and one for "
            "the end of the text",
        ),
    ],
)
def test_a_shape_that_no_generated_model_can_have_is_refused(shape, message):
    assert refusal(TinyModel, **shape) == f"model.generate.{message}"


def test_sampling_that_cannot_be_is_refused():
    reported = refusal(SamplingConfig, max_new_tokens=0)
    assert reported.startswith("sampling.max_new_tokens is 0, it must be at least 1")
    reported = refusal(SamplingConfig, temperature=-0.1)
    assert reported.startswith("sampling.temperature is -0.1, it must be at least 0")


def test_a_composed_config_is_checked_in_the_same_way():
    plain = compose_plain("engine.page_size=0")
    assert refusal(from_plain, plain) == "engine.page_size is 0, it must be at least 1"


def test_the_defaults_can_be_made_without_a_config():
    assert Kvpipe().engine.device == "tpu"
