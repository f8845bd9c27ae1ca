"""The engine's shapes without the engine: exact bytes of its parameters and KV cache per device.

The installed engine's own worker is built on a mesh of the target's shape, with its model evaluated
abstractly and its KV pool traced: nothing is allocated and no weight is read. A formula would be
wrong as soon as a version places a leaf differently, as 0.0.2 and bd09a87 do with the embedding.
"""

import importlib
import inspect
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpipe.engine import compat, memory
from kvpipe.engine.kv_capacity import abstract, in_whole_pages
from kvpipe.engine.mappings import path_name, weight_mappings
from kvpipe.engine.sglang import server_arguments
from kvpipe.ledger import PerDevice
from kvpipe.phase import KvTokens, PoolSize, Size
from kvpipe.schema import EngineConfig

# More than any device has, so that the engine's own profiling never cuts the KV cache down here.
_BOUNDLESS = 1 << 60


def sizes(
    config: EngineConfig, model_dir: Path, capacities: Collection[int] = ()
) -> dict[PoolSize, PerDevice]:
    """Return the bytes on each device of a parameter set and of the KV cache.

    Args:
        config: how the engine will be started, on the devices that jax has now.
        model_dir: directory with the model's config.json.
        capacities: further capacities of the KV cache, in tokens, to give the bytes of.

    Raises:
        InputError: the engine cannot have such a capacity.
    """
    from flax import nnx

    mesh = compat.device_mesh(config.tp_size or jax.device_count() // config.dp_size)
    runner = abstract_worker(config, model_dir, mesh, config.device).model_runner
    params = sharded_leaves(nnx.state(runner.model, nnx.Param), mesh)
    pool = runner.token_to_kv_pool
    found: dict[PoolSize, PerDevice] = {
        Size.PARAMS: memory.bytes_of(params),
        Size.KV: memory.bytes_of(pool.kv_buffer),
    }
    for tokens in capacities:
        pool.size = in_whole_pages(tokens, runner.token_to_kv_pool_allocator)
        abstract(type(pool)._create_buffers)(pool)
        found[KvTokens(tokens)] = memory.bytes_of(pool.kv_buffer)
    return found


def abstract_worker(config: EngineConfig, model_dir: Path, mesh: Mesh, device: str) -> Any:
    """Return the engine's own worker, whose parameters and KV buffers are shapes on ``mesh``.

    Args:
        config: how the engine will be started.
        model_dir: directory with the model's config.json.
        mesh: the target's devices; they need not be this machine's.
        device: the target's platform, by which the engine chooses its attention backend.
    """
    with compat.pytree_registered_twice():
        importlib.import_module("sgl_jax.srt.layers.attention.native_backend")
        from sgl_jax.srt.managers.tp_worker import ModelWorker
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sgl_jax.srt.model_executor import model_runner
    from sgl_jax.srt.server_args import ServerArgs

    compat.config_of_each_engine_is_its_own()
    arguments = ServerArgs(**server_arguments(config, model_dir, ServerArgs))
    arguments.tp_size = mesh.shape["tensor"]
    arguments.device = device
    with ExitStack() as stack:
        for owner, name, value in (
            (model_runner, "get_model_loader", _AbstractLoader),
            (model_runner.ModelRunner, "get_available_device_memory", lambda runner: _BOUNDLESS),
            (MHATokenToKVPool, "_create_buffers", abstract(MHATokenToKVPool._create_buffers)),
        ):
            stack.enter_context(compat.replaced(owner, name, value))
        return ModelWorker(arguments, mesh=mesh)


class _AbstractLoader:
    """Stands in for the engine's model loader: it gives a model with shapes for weights."""

    def __init__(self, *, mesh: Mesh, **others: Any) -> None:
        self._mesh = mesh

    def load_model(self, *, model_config: Any) -> Any:
        """Return the model."""
        from flax import nnx
        from sgl_jax.srt.model_loader.arch import get_model_architecture

        model_class, _ = get_model_architecture(model_config)
        options = {"dtype": model_config.dtype, "mesh": self._mesh}
        if "rngs" in inspect.signature(model_class.__init__).parameters:  # 0.0.2 alone
            options["rngs"] = nnx.Rngs(0)
        with compat.use_mesh(self._mesh):
            model = nnx.eval_shape(lambda: model_class(model_config.hf_config, **options))
        if compat.shards_explicitly():
            _place(model, self._mesh)
        return model


def _place(model: Any, mesh: Mesh) -> None:
    """Shard each parameter as the engine's loader does, which is not always as the model says."""
    from flax import nnx

    mappings = weight_mappings(model).values()
    specs: dict[str, Any] = {
        mapping.target_path: PartitionSpec(*mapping.sharding or ()) for mapping in mappings
    }

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        spec = specs.get(path_name(path), leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    nnx.update(model, jax.tree_util.tree_map_with_path(placed, nnx.state(model, nnx.Param)))


def sharded_leaves(state: Any, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Return the leaves of an abstract nnx state, each placed on ``mesh`` as the engine places it.

    Where the engine shards explicitly a leaf's type has its partition; before, the parameter says it.
    """
    from flax import nnx

    leaves = jax.tree.leaves(state)
    if compat.shards_explicitly():
        specs = [leaf.sharding.spec for leaf in leaves]
    else:
        specs = jax.tree.leaves(
            nnx.get_partition_spec(state), is_leaf=lambda node: isinstance(node, PartitionSpec)
        )
    return [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
