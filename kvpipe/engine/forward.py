"""The engine's own model as a function of the tree that is trained; jax can differentiate it.

Only the attention writes into the KV cache, and the model calls it through its batch. With a batch
that has an attention for training, the unchanged model computes every position of whole sequences,
without a KV cache. The memory is linear in the length: each layer is computed again in the backward
pass, attention takes a chunk of the queries at a time, the logits a chunk of the tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kvpipe.engine import compat
from kvpipe.engine.params import ParamTable, path_name
from kvpipe.engine.sglang import SglangEngine
from kvpipe.engine.shapes import EngineShapes
from kvpipe.engine.training import auto, in_engine_layout
from kvpipe.engine.weight_map import Leaf, leaf_sources

# More at a time would need more memory, fewer would leave a TPU's matrix unit idle.
_QUERIES = 256
_TOKENS = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """How a model scores the tokens of sequences, from the second token on.

    Attributes:
        logprobs: natural logarithm of each token's probability, given those before it, in float32.
        entropies: entropy of the distribution that it is from, in nats.
    """

    logprobs: jax.Array
    entropies: jax.Array


@dataclass(frozen=True)
class Forward:
    """The engine's model without its arrays, and the way of a trained tree into it.

    Attributes:
        definition: the structure of the model.
        others: its state besides the parameters, as shapes.
        params: the state of its parameters, as shapes.
        leaves: the checkpoint tensor behind each parameter, by path.
        blueprint: shape, dtype and sharding of each parameter, by path.
    """

    definition: Any
    params: Any
    others: Any
    leaves: Mapping[str, Leaf]
    blueprint: Mapping[str, jax.ShapeDtypeStruct]

    @classmethod
    def of_engine(cls, engine: SglangEngine) -> Self:
        """Return the forward pass of a live engine's model; it keeps no array of it."""
        table = ParamTable(engine)
        return cls._of(engine.runner.model, leaf_sources(engine, table), table.blueprint)

    @classmethod
    def of_shapes(cls, shapes: EngineShapes) -> Self:
        """Return the forward pass of a model that is not loaded, for a plan."""
        return cls._of(shapes.runner.model, shapes.sources, shapes.params)

    @classmethod
    def _of(cls, model: Any, leaves: Mapping[str, Leaf], blueprint: Mapping[str, Any]) -> Self:
        definition, *state = nnx.split(model, nnx.Param, ...)
        params, others = jax.tree.map(_unplaced, state)
        return cls(definition, params, others, leaves, blueprint)

    def __call__(self, trained: Mapping[str, jax.Array], tokens: jax.Array) -> Scores:
        """Return the scores of sequences, of shape [sequences, length - 1].

        Args:
            trained: the tree that is trained, by Hugging Face name and in its layout.
            tokens: token ids of shape [sequences, length]. Padding is on the right: no token sees
                one to its right.
        """
        params = self._engine_params(trained)
        shardings = jax.tree_util.tree_map_with_path(self._sharding, self.params)
        mesh = jax.tree.leaves(shardings)[0].mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        return compat.in_engine_axes(self._scores_of, shardings, everywhere)(params, tokens)

    def _scores_of(self, params: Any, tokens: jax.Array) -> Scores:
        """Return the scores of sequences; the engine's model runs as the engine runs it."""
        from sgl_jax.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
        from sgl_jax.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

        rows, length = tokens.shape
        logits_of = LogitsProcessor.__call__
        # By this mode it returns the logits of all the positions that it is given.
        metadata = LogitsMetadata(
            forward_mode=ForwardMode.DECODE, capture_hidden_mode=CaptureHiddenMode.NULL
        )
        model = nnx.merge(self.definition, params, self.others)
        with _layers_computed_again(model), compat.replaced(LogitsProcessor, "__call__", _unscored):
            positions = jnp.tile(jnp.arange(length), rows)
            attention = _attention(rows)
            batch = _Batch(tokens.reshape(-1), positions, attention, metadata.forward_mode)
            (processor, hidden, head), *_ = model(batch, _Pools(), metadata)
        hidden = hidden.reshape(rows, length, -1)[:, :-1]

        def logits(part: jax.Array) -> jax.Array:
            return logits_of(processor, part, head, metadata).next_token_logits

        return _scores(logits, hidden, tokens[:, 1:])

    def _engine_params(self, trained: Mapping[str, jax.Array]) -> Any:
        """Return the state of the model's parameters that a trained tree gives."""

        def placed(path: tuple[Any, ...], shape: Any) -> jax.Array:
            del shape
            leaf, like = self.leaves[path_name(path)], self.blueprint[path_name(path)]
            weight = in_engine_layout(trained[leaf.source], leaf.transpose, leaf.heads, like.dtype)
            named = self._sharding(path)
            sharding = NamedSharding(auto(named.mesh), named.spec)
            return jax.lax.with_sharding_constraint(weight, sharding)

        return jax.tree_util.tree_map_with_path(placed, self.params)

    def _sharding(self, path: tuple[Any, ...], shape: Any = None) -> Any:
        """Return the sharding of a parameter in the engine."""
        del shape
        return self.blueprint[path_name(path)].sharding


@dataclass(frozen=True)
class _Batch:
    """What a model reads of the engine's ForwardBatch."""

    input_ids: jax.Array
    positions: jax.Array
    attn_backend: Callable[..., Any]
    forward_mode: Any


@dataclass(frozen=True)
class _Pools:
    """The KV caches that a model hands to its attention: there are none."""

    token_to_kv_pool: None = None


def _unplaced(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _unscored(processor: Any, hidden: jax.Array, head: Any, metadata: Any) -> Any:
    """Replace the engine's logits, which would be those of all positions at once."""
    del metadata
    return processor, hidden, head


@contextmanager
def _layers_computed_again(model: Any) -> Iterator[None]:
    """Keep only the input of each layer of ``model`` for the backward pass."""
    kinds = {
        type(node) for path, node in nnx.iter_graph(model) if len(path) > 1 and path[-2] == "layers"
    }

    def again(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: jax.checkpoint(lambda: call(*args, **kwargs))()

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(compat.replaced(kind, "__call__", again(kind.__call__)))
        yield


def _attention(rows: int) -> Callable[..., Any]:
    """Return a causal attention over whole sequences, in place of the engine's over its KV cache."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: Any, *_: Any
    ) -> tuple[jax.Array, None]:
        def of_sequences(*projected: jax.Array) -> jax.Array:
            q, k, v = (x.reshape(rows, -1, x.shape[-2], x.shape[-1]) for x in projected)
            found = _causal(q, k, v, layer.scaling)
            return found.reshape(-1, found.shape[-2] * found.shape[-1])

        # Tokens and heads lie where those of the queries do.
        spec = PartitionSpec(*jax.typeof(q).sharding.spec[:2])
        return compat.axes_left_to_xla(of_sequences, spec)(q, k, v), None

    return attend


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Return causal attention of [sequences, length, heads, head_dim], chunk by chunk of queries."""
    length = q.shape[1]
    keys = jnp.arange(length)

    def of_chunk(queries: jax.Array, positions: jax.Array) -> jax.Array:
        mask = positions[:, None] >= keys
        return jax.nn.dot_product_attention(queries, k, v, mask=mask[None, None], scale=scale)

    queries = _chunks(q, _QUERIES, axis=1)
    positions = _chunks(keys, _QUERIES, axis=0)
    found = jax.lax.map(lambda chunk: jax.checkpoint(of_chunk)(*chunk), (queries, positions))
    return jnp.concatenate(list(found), axis=1)[:, :length]


def _scores(
    logits_of: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array
) -> Scores:
    """Return the scores of targets, with the logits of a chunk of tokens at a time."""

    def of_chunk(part: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(logits_of(part).astype(jnp.float32))
        is_chosen = jnp.arange(logprobs.shape[-1]) == ids[:, None]
        chosen = jnp.where(is_chosen, logprobs, 0.0).sum(axis=-1)
        return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)

    parts = _chunks(hidden.reshape(-1, hidden.shape[-1]), _TOKENS, axis=0)
    ids = _chunks(targets.reshape(-1), _TOKENS, axis=0)
    found = jax.lax.map(lambda chunk: jax.checkpoint(of_chunk)(*chunk), (parts, ids))
    return Scores(*(x.reshape(-1)[: targets.size].reshape(targets.shape) for x in found))


def _chunks(array: jax.Array, size: int, axis: int) -> jax.Array:
    """Return an array as chunks of one axis, which become the first one; the last is padded."""
    length = array.shape[axis]
    size = min(size, length)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -length % size)
    padded = jnp.pad(array, padding)
    before, after = padded.shape[:axis], padded.shape[axis + 1 :]
    return jnp.moveaxis(padded.reshape(*before, -1, size, *after), axis, 0)
