"""Generate a tiny model locally: the same bytes on every machine, without a download.

Tests, examples and the smoke run need a checkpoint that the real engine loads and whose greedy text
distinguishes two sets of weights. So the random weights are arranged: the text must vary, and the
best token must win by a margin on which two correct implementations agree. This module runs on
Python 3.11 too, because `tests/golden/make.py` imports it next to torch, which kvpipe never installs.
"""

import hashlib
import itertools
import json
import math
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvpipe.checkpoints import safetensors
from kvpipe.checkpoints.tiny_config import config_json
from kvpipe.config.schema import ARCHITECTURES, TinyModel

FORMAT_VERSION = 1
"""Increase it when the same spec would give other bytes, so that no stale cache is used."""

_END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_MERGED_LETTERS = "etaoinshrdlucmfw"  # the most frequent, so that the merges apply to English

# Scales, found by measuring transformers' greedy text (see tests/golden/make.py). Standard
# deviations are for inputs of unit size; only their ratio matters, since every layer normalises.
_STREAM = 27  # the best of some 180: no near-tie in 64 tokens of seed 0, same ids in bfloat16
_EMBEDDING_NORM = 4.0  # norm of an output row; gives logits a standard deviation near 5
_QUIET = 0.25  # relative norm of the rows of tokens that should not be picked
_SHARPNESS = 2.0  # of attention; lower: the text loops; higher: rounding errors are amplified
_ATTENTION = 0.25
_MLP = 0.0625
_RECALL = 4.0  # of the last MLP; it must outweigh the input token in the residual stream


def ensure(spec: TinyModel, cache_dir: Path) -> Path:
    """Return the absolute path of the spec's Hugging Face directory; generate it if it is missing.

    The directory gets its final name only when it is complete, so several processes may ask for
    the same one at once.
    """
    final = directory_of(spec, cache_dir)
    if final.is_dir():
        return final
    unfinished = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        _write_directory(spec, unfinished)
        unfinished.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was faster and wrote the same bytes
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def directory_of(spec: TinyModel, cache_dir: Path) -> Path:
    """Return the absolute path of the spec's directory, whether or not it is there."""
    identity = json.dumps({"format": FORMAT_VERSION, **asdict(spec)}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_dir.resolve() / f"tiny-{ARCHITECTURES[spec.architecture]}-{digest}"


def _write_directory(spec: TinyModel, directory: Path) -> None:
    safetensors.write(directory / "model.safetensors", _tensors(spec))
    merges = _merges(spec.vocab_size)
    vocabulary = _vocabulary(merges)
    (directory / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )
    for name, content in (
        ("config.json", config_json(spec)),
        ("generation_config.json", {"eos_token_id": spec.vocab_size - 1, "do_sample": False}),
        ("vocab.json", vocabulary),
        ("tokenizer.json", _tokenizer(spec, vocabulary, merges)),
        ("tokenizer_config.json", _tokenizer_config(spec)),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (directory / name).write_text(text + "\n", encoding="utf-8")


# --- Weights ---


class _Draw:
    """Random tensors that depend only on the seed and the tensor's name, not on their order.

    Uniform values are made from raw generator bits, which numpy keeps stable across versions,
    unlike its normal sampling. Every value is representable in bfloat16, so that a float32
    checkpoint and a bfloat16 one are the same model.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
        """Return float32 values around 0 with the given standard deviation."""
        digest = hashlib.sha256(f"{_STREAM}/{self._seed}/{name}".encode()).digest()
        bits = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(math.prod(shape))
        unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
        return _rounded(unit.reshape(shape) * np.float32(std * math.sqrt(3)))

    def linear(self, name: str, out_size: int, in_size: int, std: float) -> NDArray[np.float32]:
        """Return `[out, in]` weights whose outputs have `std` for inputs of unit size."""
        return self(name, (out_size, in_size), std / math.sqrt(in_size))

    def norm(self, name: str, size: int, mean: float = 1.0) -> NDArray[np.float32]:
        """Return a norm's `[size]` scales, with some spread so that swapped norms are noticed."""
        return _rounded(mean + self(name, (size,), 0.1 * mean))


def _rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def _tensors(spec: TinyModel) -> dict[str, NDArray[Any]]:
    """Return all tensors under their Hugging Face names, linear weights as `[out, in]`."""
    draw = _Draw(spec.seed)
    output = _output_rows(spec, draw)
    tensors = {"model.embed_tokens.weight": output}
    if not spec.tie_word_embeddings:
        tensors["model.embed_tokens.weight"] = draw.linear(
            "model.embed_tokens.weight", spec.vocab_size, spec.hidden_size, _EMBEDDING_NORM
        )
        tensors["lm_head.weight"] = output
    for layer in range(spec.num_hidden_layers):
        tensors |= _layer(spec, draw, f"model.layers.{layer}")
    last = f"model.layers.{spec.num_hidden_layers - 1}.mlp.down_proj.weight"
    tensors[last] = _recall(spec, output)
    tensors["model.norm.weight"] = draw.norm("model.norm.weight", spec.hidden_size)
    dtype = np.dtype(getattr(ml_dtypes, spec.torch_dtype, spec.torch_dtype))
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


def _output_rows(spec: TinyModel, draw: _Draw) -> NDArray[np.float32]:
    """Return the `[vocab, hidden]` output rows, whose products with hidden states are the logits.

    Short rows give small logits, so the text consists of printable characters and rarely ends.
    """
    rows = draw.linear("output", spec.vocab_size, spec.hidden_size, _EMBEDDING_NORM)
    gains = np.full((spec.vocab_size, 1), _QUIET, np.float32)
    gains[_printable_ids(spec.vocab_size)] = 1.0
    return rows * gains


def _recall(spec: TinyModel, output: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a `[hidden, intermediate]` down projection: each hidden unit writes one token's row.

    A unit's value is a product of two nearly normal values. Such products have long tails, so the
    best token wins by about twice the margin of random columns.
    """
    printable = _printable_ids(spec.vocab_size)
    columns = output[printable[np.arange(spec.intermediate_size) % len(printable)]].T
    return np.ascontiguousarray(columns * np.float32(_RECALL))


def _layer(spec: TinyModel, draw: _Draw, prefix: str) -> dict[str, NDArray[np.float32]]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    tensors = {
        f"{prefix}.{name}.weight": draw.norm(f"{prefix}.{name}", hidden)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    tensors |= _attention(spec, draw, f"{prefix}.self_attn")
    for name, out_size, in_size, std in (
        ("gate_proj", inner, hidden, 1.0),
        ("up_proj", inner, hidden, 1.0),
        ("down_proj", hidden, inner, _MLP),
    ):
        weight = f"{prefix}.mlp.{name}.weight"
        tensors[weight] = draw.linear(weight, out_size, in_size, std)
    return tensors


def _attention(spec: TinyModel, draw: _Draw, prefix: str) -> dict[str, NDArray[np.float32]]:
    tensors: dict[str, NDArray[np.float32]] = {}
    query_size = spec.num_attention_heads * spec.head_dim
    kv_size = spec.num_key_value_heads * spec.head_dim
    for name, out_size, in_size, std in (
        ("q_proj", query_size, spec.hidden_size, _SHARPNESS),
        ("k_proj", kv_size, spec.hidden_size, 1.0),
        ("v_proj", kv_size, spec.hidden_size, 1.0),
        ("o_proj", spec.hidden_size, query_size, _ATTENTION),
    ):
        weight, bias = f"{prefix}.{name}.weight", f"{prefix}.{name}.bias"
        tensors[weight] = draw.linear(weight, out_size, in_size, std)
        if spec.architecture == "Qwen2ForCausalLM" and name != "o_proj":
            tensors[bias] = draw(bias, (out_size,), 0.1)
    if spec.architecture == "Qwen3ForCausalLM":  # its norms undo the projections' scale
        for name, mean in (("q_norm", _SHARPNESS), ("k_norm", 1.0)):
            weight = f"{prefix}.{name}.weight"
            tensors[weight] = draw.norm(weight, spec.head_dim, mean)
    return tensors


# --- Tokenizer ---


def _byte_alphabet() -> list[str]:
    """Return the character of each byte in GPT-2's byte-level BPE, by token id.

    Bytes with a visible Latin-1 character map to it and come first; the others get the code
    points from 256 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in [*visible, *range(_BYTES, 2 * _BYTES - len(visible))]]


def _merges(vocab_size: int) -> list[str]:
    """Return the BPE merges that fill the vocabulary, e.g. `e t` and, later, `et a`."""
    words = (
        "".join(letters)
        for length in itertools.count(2)
        for letters in itertools.product(_MERGED_LETTERS, repeat=length)
    )
    return [f"{word[:-1]} {word[-1]}" for word in itertools.islice(words, vocab_size - _BYTES - 1)]


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Return every token but the end of text with its id."""
    tokens = [*_byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate(tokens)}


def _printable_ids(vocab_size: int) -> NDArray[np.intp]:
    """Return the ids of printable ASCII characters (space included) and of merged letters."""
    alphabet = _byte_alphabet()
    space = alphabet.index(chr(_BYTES + ord(" ")))  # the control characters come first
    ascii_ids = [number for number, char in enumerate(alphabet) if ord(char) < 0x7F]
    return np.array([*ascii_ids, space, *range(_BYTES, vocab_size - 1)])


def _tokenizer(spec: TinyModel, vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Return the content of `tokenizer.json`."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": spec.vocab_size - 1, **_end_of_text()}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def tokenizer(spec: TinyModel) -> Any:
    """Return the tokenizer of the spec's model, without the model."""
    from tokenizers import Tokenizer

    merges = _merges(spec.vocab_size)
    return Tokenizer.from_str(json.dumps(_tokenizer(spec, _vocabulary(merges), merges)))


def _tokenizer_config(spec: TinyModel) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(spec.vocab_size - 1): _end_of_text()},
        "bos_token": None,
        "eos_token": _END_OF_TEXT,
        "pad_token": _END_OF_TEXT,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position_embeddings,
    }


def _end_of_text() -> dict[str, Any]:
    return {
        "content": _END_OF_TEXT,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
