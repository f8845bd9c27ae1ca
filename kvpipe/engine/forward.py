"""The engine's own model as a function of the tree that is trained; jax can differentiate it.

Only the attention writes into the KV cache, and the model calls it through its batch. With a batch
that has an attention for training, the unchanged model computes every position of whole sequences,
without a KV cache. The memory is linear in the length: each layer is computed again in the backward
pass, attention takes a block of the scores at a time, the logits a chunk of the tokens. What stays of
a layer is its input, with the tokens shared out over the devices; its weights in the engine's dtype and
layout are made again too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpipe.engine import compat
from kvpipe.engine.params import ParamTable, path_name
from kvpipe.engine.sglang import SglangEngine
from kvpipe.engine.shapes import EngineShapes
from kvpipe.engine.training import auto, in_engine_layout
from kvpipe.engine.weight_map import Leaf, leaf_sources

# More at a time would need more memory, fewer would leave a TPU's matrix unit idle.
_QUERIES = 256
_TOKENS = 256
# Splash attention takes blocks of the scores, of at most so many queries and keys; all are whole lanes.
_BLOCK = 512
_LANES = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """A model's scores of the tokens of sequences, from the second token on.

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
        shardings = {leaf.source: self._sharding(leaf) for leaf in self.leaves.values()}
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return compat.in_engine_axes(self._scores_of, shardings, everywhere)(trained, tokens)

    def _scores_of(self, trained: Mapping[str, jax.Array], tokens: jax.Array) -> Scores:
        """Return the scores of sequences; the engine's model runs as the engine runs it."""
        from sgl_jax.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
        from sgl_jax.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

        rows, length = tokens.shape
        logits_of = LogitsProcessor.__call__
        # By this mode it returns the logits of all the positions that it is given.
        metadata = LogitsMetadata(
            forward_mode=ForwardMode.DECODE, capture_hidden_mode=CaptureHiddenMode.NULL
        )
        model = nnx.merge(self.definition, self.params, self.others)
        model = self._filled(model, (), trained)
        with (
            self._layers_computed_again(model, trained),
            compat.replaced(LogitsProcessor, "__call__", _unscored),
        ):
            positions = jnp.tile(jnp.arange(length), rows)
            attention = _attention(rows, self._mesh)
            batch = _Batch(tokens.reshape(-1), positions, attention, metadata.forward_mode)
            (processor, hidden, head), *_ = model(batch, _Pools(), metadata)
        hidden = hidden.reshape(rows, length, -1)[:, :-1]
        path = next(path for path, module in nnx.iter_graph(model) if module is head)

        def logits(part: jax.Array) -> jax.Array:
            # Filled for each chunk, so that its gradient is summed in the trained tree's dtype.
            filled = self._filled(head, path, trained)
            return logits_of(processor, part, filled, metadata).next_token_logits

        return _scores(logits, hidden, tokens[:, 1:])

    def _filled(self, module: Any, path: tuple[Any, ...], trained: Mapping[str, jax.Array]) -> Any:
        """Return the module at a path of the model, with its parameters from a trained tree."""
        definition, params, others = nnx.split(module, nnx.Param, ...)

        def placed(inside: tuple[Any, ...], shape: Any) -> jax.Array:
            del shape
            name = ".".join(map(str, (*path, path_name(inside))))
            leaf, like = self.leaves[name], self.blueprint[name]
            named: Any = like.sharding
            lay_out = compat.axes_left_to_xla(
                lambda given: in_engine_layout(given, leaf.transpose, leaf.heads, like.dtype),
                named.spec,
            )
            weight = lay_out(trained[leaf.source])
            # One that the engine has on each device may stay shared out, as the trainer has it.
            if compat.shards_explicitly() or not any(named.spec):
                return weight
            sharding = NamedSharding(auto(named.mesh), named.spec)
            return jax.lax.with_sharding_constraint(weight, sharding)

        return nnx.merge(definition, jax.tree_util.tree_map_with_path(placed, params), others)

    def _sharding(self, leaf: Leaf) -> NamedSharding:
        """Return the sharding of a trained parameter that is the engine's, in the other layout."""
        like: Any = self.blueprint[leaf.path]
        axes = [*like.sharding.spec, *[None] * (len(like.shape) - len(like.sharding.spec))]
        spec = PartitionSpec(*(reversed(axes) if leaf.transpose else axes))
        return NamedSharding(like.sharding.mesh, spec)

    @contextmanager
    def _layers_computed_again(
        self, model: Any, trained: Mapping[str, jax.Array]
    ) -> Iterator[None]:
        """Keep only the input of each layer of ``model`` for the backward pass."""
        layers = {
            id(module): (path, type(module))
            for path, module in nnx.iter_graph(model)
            if len(path) > 1 and path[-2] == "layers"
        }

        def again(call: Callable[..., Any]) -> Callable[..., Any]:
            def computed(layer: Any, *args: Any, **kwargs: Any) -> Any:
                path, _ = layers[id(layer)]

                def once() -> Any:
                    filled = self._filled(layer, path, trained)
                    hidden, residual, *others = call(filled, *args, **kwargs)
                    # The next layer would begin with this sum; without a residual it takes it as is.
                    return self._shared_out(hidden + residual), None, *others

                return jax.checkpoint(once)()

            return computed

        with ExitStack() as stack:
            for kind in {kind for _, kind in layers.values()}:
                stack.enter_context(compat.replaced(kind, "__call__", again(kind.__call__)))
            yield

    def _shared_out(self, hidden: jax.Array) -> jax.Array:
        """Return hidden states of [tokens, features] with the tokens shared out over the devices."""
        mesh = self._mesh
        # Models with explicit axes take hidden states only as they themselves lay them out.
        if compat.shards_explicitly() or len(hidden) % mesh.size:
            return hidden
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return jax.lax.with_sharding_constraint(hidden, sharding)

    @property
    def _mesh(self) -> Mesh:
        """The engine's devices; XLA chooses the shardings within a program."""
        placed: Any = next(iter(self.blueprint.values())).sharding
        return auto(placed.mesh)


@dataclass(frozen=True)
class _Batch:
    """The fields of the engine's ForwardBatch that a model reads."""

    input_ids: jax.Array
    positions: jax.Array
    attn_backend: Callable[..., Any]
    forward_mode: Any


@dataclass(frozen=True)
class _Pools:
    """Stand-in for the KV caches that a model hands to its attention; it has none."""

    token_to_kv_pool: None = None


def _unplaced(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _unscored(processor: Any, hidden: jax.Array, head: Any, metadata: Any) -> Any:
    """Replace the engine's logits, which would be those of all positions at once."""
    del metadata
    return processor, hidden, head


def _attention(rows: int, mesh: Mesh) -> Callable[..., Any]:
    """Return a causal attention over whole sequences, in place of the engine's over its KV cache."""
    on_tpu = mesh.devices.flat[0].platform == "tpu"

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: Any, *_: Any
    ) -> tuple[jax.Array, None]:
        def of_sequences(*projected: jax.Array) -> jax.Array:
            q, k, v = (x.reshape(rows, -1, x.shape[-2], x.shape[-1]) for x in projected)
            if on_tpu and q.shape[-1] % _LANES == 0:
                found = _splash(q, k, v, layer.scaling, mesh)
            else:
                found = _causal(q, k, v, layer.scaling)
            return found.reshape(-1, found.shape[-2] * found.shape[-1])

        # Tokens and heads lie where those of the queries do.
        spec = PartitionSpec(*jax.typeof(q).sharding.spec[:2])
        return compat.axes_left_to_xla(of_sequences, spec)(q, k, v), None

    return attend


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mesh: Mesh, interpret: bool = False
) -> jax.Array:
    """Return causal attention of [sequences, length, heads, head_dim] by jax's kernels for TPUs.

    Each device has its own heads. ``interpret`` is for devices of another kind.
    """
    # Its import takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length = q.shape[1]
    padded = -(-length // _LANES) * _LANES
    block: Any = next(size for size in range(_BLOCK, 0, -_LANES) if padded % size == 0)
    mask = splash_attention_mask.CausalMask((padded, padded))

    def of_device(*arrays: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in arrays)
        attend: Any = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=splash_attention_kernel.BlockSizes(*[block] * 8),
            interpret=interpret,
        )
        found: Any = jax.vmap(attend)(q, k, v)
        return found.swapaxes(1, 2)

    rows, heads, *_ = mesh.axis_names
    spec = PartitionSpec(None if len(q) % mesh.shape[rows] else rows, None, heads)
    pad = ((0, 0), (0, padded - length), (0, 0), (0, 0))
    arrays = [jnp.pad(x, pad) for x in (q * scale, k, v)]
    # Its kernels do not say over which axes their results vary.
    shared: Any = jax.shard_map(
        of_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return shared(*arrays)[:, :length]


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
    return jnp.moveaxis(found, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, :length]


def _scores(
    logits_of: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array
) -> Scores:
    """Return the scores of targets, with the logits of a chunk of tokens at a time."""

    def of_chunk(part: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(logits_of(part).astype(jnp.float32))
        # Not by an index: the vocabulary is shared out over the devices.
        is_chosen = jnp.arange(logprobs.shape[-1]) == ids[:, None]
        chosen = jnp.where(is_chosen, logprobs, 0).sum(-1)
        return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)

    parts = compat.shared_within(_chunks(hidden.reshape(-1, hidden.shape[-1]), _TOKENS, axis=0))
    ids = _chunks(targets.reshape(-1), _TOKENS, axis=0)
    found = jax.lax.map(lambda chunk: jax.checkpoint(of_chunk)(*chunk), (parts, ids))
    flat = (compat.on_all(each).reshape(-1) for each in found)
    return Scores(*(each[: targets.size].reshape(targets.shape) for each in flat))


def _chunks(array: jax.Array, size: int, axis: int) -> jax.Array:
    """Return an array as chunks of one axis, which become the first one; the last is padded."""
    length = array.shape[axis]
    size = min(size, length)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -length % size)
    padded = jnp.pad(array, padding)
    before, after = padded.shape[:axis], padded.shape[axis + 1 :]
    return jnp.moveaxis(padded.reshape(*before, -1, size, *after), axis, 0)
