"""A model's config.json: everything that is wrong with it, and the tensors that it asks for.

The engine reads config.json through transformers, which fills gaps with another model's defaults, and
ignores options that its models lack. Both give other text or other bytes than the person asked for,
so they are refused here, before anything is started.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvpipe.checkpoints.architectures import supported
from kvpipe.checkpoints.tensor_names import EMBEDDING, HEAD
from kvpipe.config.schema import ARCHITECTURES
from kvpipe.suggest import nearest

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_OPTIONAL_SIZES = ("head_dim", "num_key_value_heads", "max_position_embeddings")
_MOST_LAYERS = 1000  # The largest models have some 130; every layer costs time to plan.
_NUMBERS = ("rms_norm_eps", "rope_theta")
_FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
_QWEN2, _QWEN3, _LLAMA = ARCHITECTURES


@dataclass(frozen=True)
class Model:
    """A config.json without faults: the name of the engine's class, and the file's content."""

    architecture: str
    config: Mapping[str, Any]

    def undivided_by(self, tp_size: int) -> str:
        """Return why the model cannot be divided over as many devices; empty if it can."""
        heads = self.config.get("num_attention_heads") or 0
        kv_heads = self.config.get("num_key_value_heads") or heads
        inner = self.config.get("intermediate_size") or 0
        if heads % tp_size:
            return f"the model has {heads} attention heads, which it must divide"
        if kv_heads and kv_heads % tp_size and tp_size % kv_heads:
            return f"the model has {kv_heads} KV heads, and neither divides the other"
        if inner % tp_size:
            return f"the model has an intermediate_size of {inner}, which it must divide"
        return ""

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens; None if the config does not say."""
        return self.config.get("max_position_embeddings")

    @property
    def vocab_size(self) -> int | None:
        """Number of rows of the embedding."""
        return self.config.get("vocab_size")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.get("tie_word_embeddings") is True

    @property
    def tensors(self) -> dict[str, tuple[int, ...]] | None:
        """Shape of each tensor by its Hugging Face name; None of an architecture unknown here."""
        if self.architecture not in ARCHITECTURES:
            return None
        layer = dict(_layer(self.architecture, self.config))
        count = self.config["num_hidden_layers"]
        rows = (self.config["vocab_size"], self.config["hidden_size"])
        return {
            EMBEDDING: rows,
            "model.norm.weight": rows[1:],
            **({} if self.tied else {HEAD: rows}),
            **{
                f"model.layers.{index}.{name}": shape
                for index in range(count)
                for name, shape in layer.items()
            },
        }


def find_faults(config: Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with the content of a config.json, a text for each."""
    faults = list(_architecture_faults(config))
    architecture = architecture_of(config)
    known = architecture in ARCHITECTURES
    faults += _value_faults(config, _SIZES if known else ())
    if known and not faults:
        faults += [*_head_faults(config, architecture), *_ignored(config, architecture)]
        faults += _token_faults(config)
    return faults


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the architecture that the engine takes: the first that it has; empty if none."""
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    valid = supported() or names
    return next((name for name in names if isinstance(name, str) and name in valid), "")


def _architecture_faults(config: Mapping[str, Any]) -> Iterator[str]:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(n, str) for n in named):
        shown = "is missing" if named is None else f"is {named!r}"
        yield f"architectures {shown}; it names the model's class, e.g. ['{_QWEN2}']"
    elif not architecture_of(config):
        yield f"the engine has no {' or '.join(named)}; {nearest(named[0], supported())}"
    if not isinstance(kind := config.get("model_type"), str):
        shown = "is missing" if kind is None else f"is {kind!r}"
        yield f"model_type {shown}; it is the name of the config's class, e.g. 'qwen2'"


def _value_faults(config: Mapping[str, Any], required: Collection[str]) -> Iterator[str]:
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(name)
        if value is None and name in required:
            yield f"{name} is missing"
        elif value is not None and (type(value) is not int or value < 1):
            yield f"{name} is {value!r}, it must be a whole number of at least 1"
        elif name == "num_hidden_layers" and value and value > _MOST_LAYERS:
            yield f"{name} is {value}, it must be at most {_MOST_LAYERS}"
    for name in _NUMBERS:
        value = config.get(name)
        if value is not None and (type(value) not in (int, float) or not value > 0):
            yield f"{name} is {value!r}, it must be a number above 0"
    for name in _FLAGS:
        if not isinstance(value := config.get(name), bool | None):
            yield f"{name} is {value!r}, it must be true or false"


def _head_faults(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    if kv_heads is None and architecture != _LLAMA:
        yield "num_key_value_heads is missing"
    elif heads % (kv_heads or heads):
        yield f"num_attention_heads is {heads}, no multiple of num_key_value_heads ({kv_heads})"
    if head_dim is None and architecture == _QWEN3:
        yield "head_dim is missing"
    elif head_dim is None and hidden % heads:
        yield f"hidden_size is {hidden}, no multiple of num_attention_heads ({heads})"
    elif _head_dim(config) % 2:
        yield f"head_dim is {_head_dim(config)}, rotary embeddings need an even one"


def _ignored(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Yield the options that change a model's output and that the engine does not read."""
    scaling = config.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
    honoured = "llama3" if architecture == _LLAMA else "default"
    if scaling is not None and kind != honoured:
        yield (
            f"rope_scaling is of type {kind!r}, which the engine does not apply to "
            f"{architecture}; set it to null, and the context to what the model has without it"
        )
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        yield f"hidden_act is {act!r}, but the engine always applies silu"
    if config.get("use_sliding_window"):
        yield "use_sliding_window is true, but the engine attends to the whole context"
    if config.get("quantization_config") is not None:
        yield "quantization_config is there, but the engine takes no quantized weights"
    if config.get("mlp_bias"):
        yield "mlp_bias is true, but the engine's MLP has no biases"
    if architecture == _QWEN2 and config.get("attention_bias") is False:
        yield f"attention_bias is false, but {architecture} always has biases of q, k and v"


def _token_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens that the model's vocabulary does not have."""
    for key in ("bos_token_id", "eos_token_id"):
        given = config.get(key)
        for token in given if isinstance(given, list) else [given]:
            if isinstance(token, int) and not 0 <= token < config["vocab_size"]:
                yield (
                    f"{key} is {token}, but the model's vocabulary ends at "
                    f"{config['vocab_size'] - 1}"
                )


def _layer(architecture: str, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name within a layer, and the shape, of each of its tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    query, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    biased = "qkv" if architecture == _QWEN2 else "qkvo" if config.get("attention_bias") else ""
    for name, out_size, in_size in (
        ("q", query, hidden),
        ("k", kv, hidden),
        ("v", kv, hidden),
        ("o", hidden, query),
    ):
        yield f"self_attn.{name}_proj.weight", (out_size, in_size)
        if name in biased:
            yield f"self_attn.{name}_proj.bias", (out_size,)
    if architecture == _QWEN3:
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
