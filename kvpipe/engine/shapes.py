"""The engine's shapes without the engine: exact bytes of its parameters and KV cache per device.

The installed engine's own worker is built on a mesh of the target's shape, with its model evaluated
abstractly and its KV pool traced: nothing is allocated and no weight is read. A formula would be
wrong as soon as a version places a leaf differently, as 0.0.2 and bd09a87 do with the embedding.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpipe.engine import compat, memory
from kvpipe.engine.sglang import server_arguments
from kvpipe.ledger import PerDevice
from kvpipe.phase import Size
from kvpipe.schema import EngineConfig

# More than any device has, so that the engine's own profiling never cuts the KV cache down here.
_BOUNDLESS = 1 << 60


def sizes(config: EngineConfig, model_dir: Path) -> dict[Size, PerDevice]:
    """Return the bytes on each device of a parameter set and of the KV cache.

    Args:
        config: how the engine will be started, on the devices that jax has now.
        model_dir: directory with the model's config.json.
    """
    from flax import nnx
    from sgl_jax.srt.utils.mesh_utils import create_device_mesh

    tp_size = config.tp_size or jax.device_count() // config.dp_size
    mesh = create_device_mesh(ici_parallelism=[-1, tp_size, 1], dcn_parallelism=[1, 1, 1])
    runner = abstract_worker(config, model_dir, mesh, config.device).model_runner
    params = sharded_leaves(nnx.state(runner.model, nnx.Param), mesh)
    return {
        Size.PARAMS: memory.bytes_of(params),
        Size.KV: memory.bytes_of(runner.token_to_kv_pool.kv_buffer),
    }


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
    from sgl_jax.srt.model_executor.model_runner import ModelRunner
    from sgl_jax.srt.server_args import ServerArgs

    compat.config_of_each_engine_is_its_own()
    arguments = ServerArgs(**server_arguments(config, model_dir, ServerArgs))
    arguments.tp_size = mesh.shape["tensor"]
    arguments.device = device
    with ExitStack() as stack:
        for owner, name, value in (
            (ModelRunner, "load_model", _load_abstract_model),
            (ModelRunner, "get_available_device_memory", lambda runner: _BOUNDLESS),
            (MHATokenToKVPool, "_create_buffers", _abstract(MHATokenToKVPool._create_buffers)),
        ):
            stack.enter_context(replaced(owner, name, value))
        return ModelWorker(arguments, mesh=mesh)


def _load_abstract_model(runner: Any) -> None:
    """Do what the runner's ``load_model`` does, with shapes for weights."""
    runner.model_config.validate_tensor_parallel_config(runner.tp_size)
    runner.model_config.configure_for_tensor_parallel(runner.tp_size)
    runner.model = _abstract_model(runner.model_config, runner.mesh)
    runner.dtype = runner.model_config.dtype
    runner.start_layer, runner.end_layer = 0, runner.model_config.num_hidden_layers
    runner.num_effective_layers = runner.end_layer


def _abstract(create_buffers: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return ``create_buffers`` of a KV pool that traces the buffers instead of making them."""

    def create(pool: Any) -> None:
        def traced() -> Any:
            create_buffers(pool)
            return pool.kv_buffer

        shapes = jax.eval_shape(traced)
        pool.kv_buffer = [
            jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool.kv_sharding)
            for shape in shapes
        ]

    return create


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let the attribute ``name`` of ``owner`` be ``value`` for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _abstract_model(model_config: Any, mesh: Mesh) -> Any:
    from flax import nnx
    from sgl_jax.srt.model_loader.arch import get_model_architecture

    model_class, _ = get_model_architecture(model_config)
    with mesh:
        return nnx.eval_shape(
            lambda: model_class(model_config.hf_config, model_config.dtype, nnx.Rngs(0), mesh)
        )


def sharded_leaves(state: Any, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Return the leaves of an abstract nnx state with the shardings of its partition specs."""
    from flax import nnx

    specs = jax.tree.leaves(
        nnx.get_partition_spec(state), is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
    return [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(jax.tree.leaves(state), specs, strict=True)
    ]
