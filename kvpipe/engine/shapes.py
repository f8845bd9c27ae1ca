"""The engine's shapes without the engine: exact bytes of its parameters and KV cache per device.

The installed engine's own model is evaluated abstractly on a mesh of the target's shape, and its
own KV pool is traced: nothing is allocated and no weight is read. A formula would be wrong as soon
as a version places a leaf differently, as 0.0.2 and bd09a87 do with the embedding.
"""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from kvpipe.engine import compat, memory
from kvpipe.engine.sglang import server_arguments
from kvpipe.ledger import PerDevice
from kvpipe.phase import Size
from kvpipe.schema import EngineConfig


def sizes(config: EngineConfig, model_dir: Path) -> dict[Size, PerDevice]:
    """Return the bytes on each device of a parameter set and of the KV cache.

    Args:
        config: how the engine will be started, on the devices that jax has now.
        model_dir: directory with the model's config.json.
    """
    with compat.pytree_registered_twice():
        from sgl_jax.srt.configs.model_config import ModelConfig
        from sgl_jax.srt.server_args import ServerArgs

        compat.config_of_each_engine_is_its_own()
        arguments = ServerArgs(**server_arguments(config, model_dir, ServerArgs))
        model_config = ModelConfig.from_server_args(arguments)
        model_config.validate_tensor_parallel_config(arguments.tp_size)
        model_config.configure_for_tensor_parallel(arguments.tp_size)
        mesh = _mesh(arguments.tp_size)
        return {
            Size.PARAMS: memory.bytes_of(_parameters(model_config, mesh)),
            Size.KV: memory.bytes_of(_kv_buffers(config, arguments, model_config, mesh)),
        }


def _mesh(tp_size: int) -> Mesh:
    """Return the mesh that the engine's scheduler makes of all devices."""
    from sgl_jax.srt.utils.mesh_utils import create_device_mesh

    return create_device_mesh(ici_parallelism=[-1, tp_size, 1], dcn_parallelism=[1, 1, 1])


def _parameters(model_config: Any, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Return the parameters of the engine's model, each with its own sharding."""
    from flax import nnx
    from sgl_jax.srt.model_loader.arch import get_model_architecture

    model_class, _ = get_model_architecture(model_config)

    def create() -> Any:
        return model_class(model_config.hf_config, model_config.dtype, nnx.Rngs(0), mesh)

    with mesh:
        state = nnx.state(nnx.eval_shape(create), nnx.Param)
    specs = jax.tree.leaves(nnx.get_partition_spec(state), is_leaf=_is_spec)
    leaves = jax.tree.leaves(state)
    return [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)


def _kv_buffers(
    config: EngineConfig, arguments: Any, model_config: Any, mesh: Mesh
) -> list[jax.ShapeDtypeStruct]:
    """Return the KV buffers as the engine's own pool makes them, traced and not made."""
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool

    pools: list[Any] = []

    def create() -> Any:
        pool = MHATokenToKVPool(
            size=config.max_total_tokens // config.page_size * config.page_size,
            page_size=config.page_size,
            dtype=model_config.dtype,
            head_num=model_config.get_total_num_kv_heads_with_replication(arguments.tp_size),
            head_dim=model_config.head_dim,
            layer_num=model_config.num_hidden_layers,
            mesh=mesh,
        )
        pools.append(pool)
        return pool.kv_buffer

    buffers = jax.eval_shape(create)
    sharding = pools[0].kv_sharding
    return [jax.ShapeDtypeStruct(b.shape, b.dtype, sharding=sharding) for b in buffers]
