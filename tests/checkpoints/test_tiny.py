import hashlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.checkpoints import tiny
from kvpipe.checkpoints.mllm import hf_weights, tree_from_checkpoint
from kvpipe.checkpoints.safetensors import open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_float32.json"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 300,
}
ARCHITECTURES = ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def default_directory(tmp_path_factory):
    return ensure(TinyModel(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(default_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_directory)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_spec_gives_the_same_bytes_in_two_places(tmp_path):
    spec = TinyModel(**SMALL)
    first, second = ensure(spec, tmp_path / "one"), ensure(spec, tmp_path / "two")
    assert first.name == second.name
    assert contents(first) == contents(second)


def test_the_directory_is_a_complete_hugging_face_one(default_directory):
    assert set(contents(default_directory)) == {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }


def test_the_path_is_absolute_even_for_a_relative_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = ensure(TinyModel(**SMALL), Path("cache"))
    assert directory.is_absolute()
    assert directory.parent == (tmp_path / "cache").resolve()


@pytest.mark.parametrize("change", [{"seed": 1}, {"torch_dtype": "float32"}, {"head_dim": 16}])
def test_another_spec_goes_to_another_directory(tmp_path, change):
    base = ensure(TinyModel(**SMALL), tmp_path)
    other = ensure(TinyModel(**SMALL | change), tmp_path)
    assert other != base
    assert contents(other)["model.safetensors"] != contents(base)["model.safetensors"]


def test_another_format_version_goes_to_another_directory(tmp_path, monkeypatch):
    base = ensure(TinyModel(**SMALL), tmp_path)
    monkeypatch.setattr(tiny, "FORMAT_VERSION", tiny.FORMAT_VERSION + 1)
    assert ensure(TinyModel(**SMALL), tmp_path) != base


def test_a_directory_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    directory = ensure(TinyModel(**SMALL), tmp_path)
    monkeypatch.setattr(tiny, "_write_directory", None)
    assert ensure(TinyModel(**SMALL), tmp_path) == directory


def test_makers_at_the_same_time_all_get_the_one_complete_directory(tmp_path, monkeypatch):
    makers = 4
    write_directory = tiny._write_directory
    all_writing = threading.Barrier(makers)

    def write_when_all_do(spec, directory):
        all_writing.wait(timeout=30)
        write_directory(spec, directory)

    monkeypatch.setattr(tiny, "_write_directory", write_when_all_do)
    with ThreadPoolExecutor(makers) as pool:
        paths = list(pool.map(lambda _: ensure(TinyModel(**SMALL), tmp_path), range(makers)))
    assert len(set(paths)) == 1
    assert list(tmp_path.iterdir()) == [paths[0]]
    assert len(open_checkpoint(paths[0])) > 0


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_maker_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def fail(spec, directory):
        (directory / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(tiny, "_write_directory", fail)
    with pytest.raises(type(error)):
        ensure(TinyModel(**SMALL), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_those_that_the_golden_answers_were_made_with(tmp_path):
    """When this fails, raise FORMAT_VERSION (or caches keep old bytes) and run golden/make.py."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["format_version"] == tiny.FORMAT_VERSION
    directory = ensure(TinyModel(**golden["spec"]), tmp_path)
    weights = (directory / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == golden["checkpoint_sha256"]


def test_the_golden_answers_are_varied_and_free_of_near_ties(tokenizer):
    for answer in json.loads(GOLDEN.read_text(encoding="utf-8"))["answers"]:
        assert tokenizer(answer["prompt"])["input_ids"] == answer["prompt_ids"]
        assert tokenizer.decode(answer["output_ids"]) == answer["text"]
        assert answer["text"].isprintable()
        assert tokenizer.eos_token_id not in answer["output_ids"]
        assert len(set(answer["output_ids"])) >= 30
        assert min(answer["gaps"]) > 0.1


def test_float32_and_bfloat16_hold_the_same_values(tmp_path):
    narrow = open_checkpoint(ensure(TinyModel(**SMALL), tmp_path))
    wide = open_checkpoint(ensure(TinyModel(**SMALL, torch_dtype="float32"), tmp_path))
    for name, array in narrow.items():
        assert array.dtype == ml_dtypes.bfloat16
        assert np.array_equal(array.astype(np.float32), wide[name])


def leaf_names(directory):
    layer = "model.layers.0."
    return {name.removeprefix(layer) for name in open_checkpoint(directory) if layer in name}


def test_each_architecture_has_its_own_leaves(tmp_path):
    qwen2, qwen3, llama = (
        leaf_names(ensure(TinyModel(architecture=name, **SMALL), tmp_path))
        for name in ARCHITECTURES
    )
    assert qwen2 - llama == {f"self_attn.{name}_proj.bias" for name in "qkv"}
    assert qwen3 - llama == {f"self_attn.{name}_norm.weight" for name in "qk"}
    assert llama <= qwen2
    assert llama <= qwen3


@pytest.mark.parametrize("tied", [True, False])
def test_only_an_untied_model_has_an_output_layer(tmp_path, tied):
    directory = ensure(TinyModel(**SMALL, tie_word_embeddings=tied), tmp_path)
    assert ("lm_head.weight" in open_checkpoint(directory)) is not tied


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_key_and_value_weights_follow_the_number_of_kv_heads(tmp_path, kv_heads):
    directory = ensure(TinyModel(**SMALL | {"num_key_value_heads": kv_heads}), tmp_path)
    weight = open_checkpoint(directory)["model.layers.1.self_attn.k_proj.weight"]
    assert weight.shape == (kv_heads * 8, 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_fits_the_mllm_tree(tmp_path, architecture):
    spec = TinyModel(architecture=architecture, **SMALL, tie_word_embeddings=False)
    checkpoint = open_checkpoint(ensure(spec, tmp_path))
    assert set(hf_weights(tree_from_checkpoint(checkpoint))) == set(checkpoint)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_config_as_it_was_specified(tmp_path, architecture):
    from transformers import AutoConfig

    spec = TinyModel(architecture=architecture, **SMALL)
    config = AutoConfig.from_pretrained(ensure(spec, tmp_path))
    assert config.architectures == [architecture]
    assert {name: getattr(config, name) for name in SMALL} == SMALL
    assert config.tie_word_embeddings
    assert config.eos_token_id == 299


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_the_tokenizer_without_a_network(tmp_path, architecture):
    from transformers import AutoTokenizer

    spec = TinyModel(architecture=architecture, **SMALL)
    loaded = AutoTokenizer.from_pretrained(ensure(spec, tmp_path))
    assert len(loaded) == 300
    assert loaded.eos_token_id == 299
    assert loaded.decode([loaded.eos_token_id], skip_special_tokens=True) == ""


def test_the_slow_tokenizer_agrees_with_the_fast_one(default_directory, tokenizer):
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(default_directory, use_fast=False)
    text = "The KV cache is dropped\nand rebuilt: 漢字."
    assert slow(text)["input_ids"] == tokenizer(text)["input_ids"]


@given(text=st.text(max_size=40))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert all(0 <= number < 512 for number in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_english_letters_are_merged(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello")["input_ids"]) == ["H", "el", "lo"]
