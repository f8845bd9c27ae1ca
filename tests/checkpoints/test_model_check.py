"""A model's directory with one thing wrong: refused in one message, before anything is started."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from kvpipe.checkpoints import safetensors
from kvpipe.checkpoints.architectures import supported
from kvpipe.checkpoints.model_check import Needs, check_directory
from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import ensure
from kvpipe.config.schema import ARCHITECTURES
from tests.checkpoints.test_model_dir import SMALL
from tests.refusal import refusal

ALL = Needs(weights=True, tokenizer=True)
FILE = "model.safetensors"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small model in which nothing is wrong."""
    return ensure(SMALL, tmp_path_factory.mktemp("good"))


@pytest.fixture
def directory(good, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(good, tmp_path / "model")


def refusal_of(directory, needs=ALL):
    """Return what is wrong with a directory, after the directory's name."""
    start, _, why = refusal(check_directory, "model.path", directory, needs).partition(
        f"{directory}: "
    )
    assert start == "model.path: "
    return why


def with_config(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return directory


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_generated_model_is_right_and_asks_for_exactly_its_tensors(
    tmp_path, architecture, tied
):
    spec = replace(SMALL, architecture=architecture, tie_word_embeddings=tied)
    made = ensure(spec, tmp_path)
    model = check_directory("model.path", made, ALL)
    assert model.tensors == {name: a.shape for name, a in open_checkpoint(made).items()}


CONFIGS = {
    "cut": ('{"architectures": ["Qwen', "config.json is not valid JSON: "),
    "empty": ("", "config.json is not valid JSON: "),
    "a list": ("[]", "config.json should be a JSON object, got a list"),
    "no text": (b"\xff\xfe\x00", "config.json is not valid JSON: "),
    "deep": ("[" * 100_000, "config.json is not valid JSON: "),
    "a key twice": ('{"a": 1, "a": 2}', "config.json is not valid JSON: it has these keys more"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_no_object_is_refused(directory, case):
    text, why = CONFIGS[case]
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal_of(directory).startswith(why)


VALUES = {
    "num_attention_heads=four": "num_attention_heads is 'four', it must be a whole number",
    "num_key_value_heads=3": "num_attention_heads is 2, no multiple of num_key_value_heads (3)",
    "num_hidden_layers=0": "num_hidden_layers is 0, it must be a whole number of at least 1",
    "num_hidden_layers=1000000000": "num_hidden_layers is 1000000000, it must be at most 1000",
    "num_hidden_layers=true": "num_hidden_layers is True, it must be a whole number",
    "hidden_size=16.5": "hidden_size is 16.5, it must be a whole number",
    "vocab_size=gone": "vocab_size is missing",
    "num_key_value_heads=gone": "num_key_value_heads is missing",
    "head_dim=7": "head_dim is 7, rotary embeddings need an even one",
    "max_position_embeddings=-1": "max_position_embeddings is -1, it must be a whole number",
    "rms_norm_eps=small": "rms_norm_eps is 'small', it must be a number above 0",
    "tie_word_embeddings=yes": "tie_word_embeddings is 'yes', it must be true or false",
    "architectures=gone": "architectures is missing; it names the model's class",
    "architectures=[]": "architectures is []; it names the model's class",
    'architectures=["MixtralForCausalLM"]': "the engine has no MixtralForCausalLM; did you mean ",
    "model_type=gone": "model_type is missing; ",
    'rope_scaling={"type": "yarn", "factor": 4.0}': (
        "rope_scaling is of type 'yarn', which the engine does not apply to Qwen2ForCausalLM"
    ),
    'rope_scaling={"rope_type": "dynamic"}': "rope_scaling is of type 'dynamic'",
    "hidden_act=gelu": "hidden_act is 'gelu', but the engine always applies silu",
    "eos_token_id=512": "eos_token_id is 512, but the model's vocabulary ends at 299",
    "use_sliding_window=true": "use_sliding_window is true, but the engine attends to the whole",
    'quantization_config={"bits": 4}': "quantization_config is there, but the engine takes no",
    "attention_bias=false": "attention_bias is false, but Qwen2ForCausalLM always has biases",
}


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value_of_the_config_and_what_the_engine_ignores_are_refused(directory, case):
    key, _, value = case.partition("=")
    why = refusal_of(with_config(directory, **{key: parsed(value)}), Needs())
    assert why.startswith(f"config.json: {VALUES[case]}")


def test_what_the_engine_applies_is_accepted(directory):
    llama3 = {"rope_type": "llama3", "factor": 8.0}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": llama3}
    check_directory("model.path", with_config(directory, **llama), Needs())
    qwen = {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": {"rope_type": "default"}}
    check_directory("model.path", with_config(directory, **qwen), Needs())


def test_everything_that_is_wrong_is_reported_at_once(directory):
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").unlink()
    (directory / FILE).write_bytes(b"")
    why = refusal_of(with_config(directory, num_hidden_layers=0, vocab_size="many"))
    assert "num_hidden_layers is 0" in why
    assert "vocab_size is 'many'" in why
    assert "it has no tokenizer" in why
    assert f"{FILE} is damaged, truncated or not a safetensors file" in why


def header(directory, change):
    """Rewrite the header of the checkpoint, after ``change`` has had its object."""
    file = directory / FILE
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def moved(by, which=0):
    def change(entries):
        offsets = entries["model.norm.weight"]["data_offsets"]
        offsets[which] += by

    return change


def overlapping(entries):
    entries["model.norm.weight"]["data_offsets"] = entries[Q_BIAS]["data_offsets"]


def negative(entries):
    entries["model.norm.weight"]["data_offsets"][0] = -8


def cut(directory):
    file = directory / FILE
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "cut": cut,
    "0 bytes": lambda directory: (directory / FILE).write_bytes(b""),
    "7 bytes": lambda directory: (directory / FILE).write_bytes(b"1234567"),
    "a header of 2^63": lambda directory: (directory / FILE).write_bytes(
        (1 << 63).to_bytes(8, "little") + b"{}"
    ),
    "no header": lambda directory: (directory / FILE).write_bytes(b"\0" * 64),
    "a lying offset": lambda directory: header(directory, moved(16, 1)),
    "a gap": lambda directory: header(directory, moved(2)),
    "overlapping tensors": lambda directory: header(directory, overlapping),
    "a negative offset": lambda directory: header(directory, negative),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_its_header(directory, case):
    DAMAGES[case](directory)
    assert refusal_of(directory).startswith(
        f"{directory / FILE} is damaged, truncated or not a safetensors"
    )


def rewritten(directory, change):
    tensors = dict(open_checkpoint(directory))
    change(tensors)
    safetensors.write(directory / "new", {name: np.array(a) for name, a in tensors.items()})
    (directory / "new").replace(directory / FILE)
    return refusal_of(directory)


def test_missing_extra_and_misshapen_tensors_are_reported_by_name(directory):
    def change(tensors):
        del tensors[Q_BIAS]
        tensors["model.layers.0.self_attn.q_proj.bia"] = np.zeros(16, ml_dtypes.bfloat16)
        tensors["model.norm.weight"] = np.zeros(17, ml_dtypes.bfloat16)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(16, np.int8)

    missing, unexpected, wrong = rewritten(directory, change).split("; ")
    assert missing.startswith(f"1 of 14 weights are missing: '{Q_BIAS}' (did you mean ")
    assert unexpected.startswith("1 are not the engine's: 'model.layers.0.self_attn.q_proj.bia' (")
    assert "weight 'model.norm.weight' has shape (17,), the config gives (16,)" in wrong
    assert "weight 'model.layers.0.input_layernorm.weight' has dtype int8" in wrong


def test_a_tied_head_that_is_written_out_is_accepted_unless_it_has_another_shape(directory):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    tensors = dict(open_checkpoint(directory))
    change(tensors)
    safetensors.write(directory / "new", {name: np.array(a) for name, a in tensors.items()})
    (directory / "new").replace(directory / FILE)
    check_directory("model.path", directory, ALL)

    def shorten(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:-1]

    assert rewritten(directory, shorten).startswith("1 are not the engine's: 'lm_head.weight'")


def test_a_checkpoint_of_torch_alone_is_none(directory):
    (directory / FILE).rename(directory / "pytorch_model.bin")
    assert refusal_of(directory) == f"checkpoint {directory} holds no *.safetensors file"
    check_directory("model.path", directory, Needs(tokenizer=True))


def test_an_index_is_held_against_its_files(directory):
    (directory / safetensors.INDEX_NAME).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "names files that are not there: gone.safetensors" in refusal_of(directory)


def without_tokenizer(directory):
    for name in ("tokenizer.json", "vocab.json"):
        (directory / name).unlink()


def more_tokens(directory):
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<new>"})
    file.write_text(json.dumps(content))


TOKENIZERS = {
    "none": (without_tokenizer, "it has no tokenizer: no tokenizer.json, no vocab.json with"),
    "vocabulary without merges": (
        lambda d: [(d / name).unlink() for name in ("tokenizer.json", "merges.txt")],
        "it has no tokenizer",
    ),
    "cut": (lambda d: (d / "tokenizer.json").write_text('{"version": '), "/tokenizer.json is no"),
    "another kind": (lambda d: (d / "tokenizer.json").write_text("{}"), "/tokenizer.json is no"),
    "more tokens": (more_tokens, "its tokenizer has the token id 300, but the model's vocabulary"),
    "config": (
        lambda d: (d / "tokenizer_config.json").write_text("{"),
        "tokenizer_config.json is not valid JSON",
    ),
    "more tokens in its config": (
        lambda d: (d / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"999": {}}}'),
        "its tokenizer has the token id 999",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_missing_damaged_or_too_large_is_refused(directory, case):
    spoil, why = TOKENIZERS[case]
    spoil(directory)
    assert why in refusal_of(directory)
    if case != "config":
        check_directory("model.path", directory, Needs(weights=True))


def test_the_engines_architectures_are_read_without_importing_it():
    assert {*ARCHITECTURES, "Qwen3MoeForCausalLM", "Phi3ForCausalLM"} <= supported()
    assert "MixtralForCausalLM" not in supported()


def test_of_an_architecture_that_kvpipe_does_not_know_only_the_headers_are_checked(directory):
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    check_directory("model.path", with_config(directory, **moe), ALL)
    cut(directory)
    assert "is damaged, truncated or not a safetensors file" in refusal_of(directory)
