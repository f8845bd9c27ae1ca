"""The engine's shapes without the engine: exact bytes of its parameters and KV cache per device.

The installed engine's own worker is built on a mesh of the target's shape, with its model evaluated
abstractly and its KV pool traced: nothing is allocated and no weight is read. A formula would be
wrong as soon as a version shards a leaf differently, as 0.0.2 and bd09a87 do with the embedding.
"""

import inspect
import traceback
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kvpipe.config.schema import EngineConfig
from kvpipe.engine import compat
from kvpipe.engine.kv_capacity import abstract, pool_size
from kvpipe.engine.memory import shard_bytes
from kvpipe.engine.params import param_paths, path_name
from kvpipe.engine.sglang import server_arguments
from kvpipe.engine.weight_map import Leaf, sources_of, weight_mappings
from kvpipe.errors import InputError, KvpipeError, is_out_of_memory
from kvpipe.pipeline.ledger import KvTokens, PoolSize, Size

# More than any device has, so that the engine's profiling never cuts the KV cache down here.
_BOUNDLESS = 1 << 80


@dataclass(frozen=True)
class EngineShapes:
    """The engine's shapes on a mesh: its own worker, and each parameter's shape by path.

    The worker has shapes for weights and KV buffers; a parameter's has dtype and sharding. Its
    model runner is emptied when this object is deleted.
    """

    mesh: Mesh
    worker: Any
    params: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def runner(self) -> Any:
        """The worker's model runner."""
        return self.worker.model_runner

    def arrays(self, capacities: Collection[int] = ()) -> dict[PoolSize, list[Any]]:
        """Return the arrays of one set of parameters and of the KV cache.

        ``capacities`` are further capacities of the KV cache, in tokens.

        Raises:
            InputError: the engine cannot have such a capacity.
        """
        pool = self.runner.token_to_kv_pool
        size, buffers = pool.size, pool.kv_buffer
        params = list(self.params.values())
        found: dict[PoolSize, list[Any]] = {Size.PARAMS: params, Size.KV: list(pool.kv_buffer)}
        for tokens in capacities:
            pool.size = pool_size(tokens, self.runner.token_to_kv_pool_allocator)
            abstract(type(pool)._create_buffers)(pool)
            found[KvTokens(tokens)] = list(pool.kv_buffer)
        pool.size, pool.kv_buffer = size, buffers
        return found

    @property
    def dummy_start(self) -> list[Any]:
        """The arrays that a start with random weights holds at its peak.

        0.0.2 makes the weights twice, the second time leaf by leaf, each whole on the first device
        before it is shared out. Later versions make them once.
        """
        first = SingleDeviceSharding(self.mesh.devices.flat[0])
        params = list(self.params.values())
        whole = [jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=first) for p in params]
        if compat.shards_explicitly():
            return [*params, max(whole, key=shard_bytes)]
        made = accumulate(map(shard_bytes, params))
        held = [done + shard_bytes(leaf) for done, leaf in zip(made, whole, strict=True)]
        last = max(range(len(held)), key=held.__getitem__)
        return [*params, *params[: last + 1], whole[last]]

    @property
    def largest_leaf(self) -> Any:
        """The parameter that takes most of a device."""
        return max(self.params.values(), key=shard_bytes)

    @property
    def sources(self) -> dict[str, Leaf]:
        """The checkpoint tensor behind each parameter, by path.

        Raises:
            EngineError: as of :func:`kvpipe.engine.weight_map.sources_of`.
        """
        return sources_of(self.runner, {path: leaf.shape for path, leaf in self.params.items()})


def of_devices_here(config: EngineConfig, model_dir: Path) -> EngineShapes:
    """Return the engine's shapes on jax's current devices."""
    mesh = compat.device_mesh(config.tp_size or jax.device_count() // config.dp_size)
    return of_mesh(config, model_dir, mesh, config.device)


def of_mesh(config: EngineConfig, model_dir: Path, mesh: Mesh, device: str) -> EngineShapes:
    """Return the engine's shapes on ``mesh``.

    The mesh has the target's devices, which need not exist on this machine; by the platform
    ``device`` the engine chooses its attention backend.

    Raises:
        InputError: the engine refuses the model on this mesh, or the capacity is too small.
    """
    worker = _abstract_worker(config, model_dir, mesh, device)
    found = EngineShapes(mesh, worker, params_of(worker.model_runner.model, mesh))
    # From bd09a87 on the runner's compiled steps refer to it, a cycle that Python's collector does not
    # see: its random keys would stay on the devices.
    weakref.finalize(found, vars(worker.model_runner).clear).atexit = False
    return found


def _abstract_worker(config: EngineConfig, model_dir: Path, mesh: Mesh, device: str) -> Any:
    """Return the engine's own worker, with shapes on ``mesh`` for parameters and KV buffers."""
    worker_class = compat.import_engine()
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sgl_jax.srt.model_executor import model_runner
    from sgl_jax.srt.server_args import ServerArgs

    compat.config_of_each_engine_is_its_own()
    arguments = ServerArgs(**server_arguments(config, model_dir, ServerArgs))
    arguments.tp_size = mesh.shape["tensor"]
    arguments.device = device
    with ExitStack() as stack:
        for owner, name, value in (
            (model_runner, "get_model_loader", AbstractLoader),
            (model_runner.ModelRunner, "get_available_device_memory", lambda runner: _BOUNDLESS),
            (
                model_runner.ModelRunner,
                "initialize_jit",
                _initialize_shapes(model_runner.ModelRunner),
            ),
            (MHATokenToKVPool, "_create_buffers", abstract(MHATokenToKVPool._create_buffers)),
            # It would list every free slot, which takes four bytes a token.
            *((cls, "clear", lambda pool: None) for cls in _allocators()),
        ):
            stack.enter_context(compat.replaced(owner, name, value))
        try:
            return worker_class(arguments, mesh=mesh)
        except Exception as error:  # its checks of a model raise whatever Python raises
            if isinstance(error, KvpipeError) or is_out_of_memory(error):
                raise
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"the engine refuses this model, mesh or capacity: {reason}"
            ) from error


def _allocators() -> list[Any]:
    """Return the engine's classes of KV allocators that reset themselves."""
    from sgl_jax.srt.mem_cache import allocator

    found = (value for value in vars(allocator).values() if inspect.isclass(value))
    return [cls for cls in found if "clear" in vars(cls) and not inspect.isabstract(cls)]


def _initialize_shapes(runner_class: Any) -> Callable[[Any], None]:
    """Return an ``initialize_jit`` that creates shapes where the engine would transfer arrays.

    HEAD transfers an empty array for each abstract leaf, which fails for devices of another
    machine.
    """
    initialize_jit = runner_class.initialize_jit

    def shape(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def initialize(runner: Any) -> None:
        with compat.replaced(jax, "device_put", shape):
            initialize_jit(runner)

    return initialize


class AbstractLoader:
    """Replaces the engine's model loader; returns a model with shapes for weights."""

    def __init__(self, *, mesh: Mesh, **others: Any) -> None:
        self._mesh = mesh

    def load_model(self, *, model_config: Any) -> Any:
        """Return the abstract model."""
        from sgl_jax.srt.model_loader.arch import get_model_architecture

        model_class, _ = get_model_architecture(model_config)
        options = {"dtype": model_config.dtype, "mesh": self._mesh}
        if "rngs" in inspect.signature(model_class.__init__).parameters:  # only in 0.0.2
            options["rngs"] = nnx.Rngs(0)
        with compat.use_mesh(self._mesh):
            model = nnx.eval_shape(lambda: model_class(model_config.hf_config, **options))
        if compat.shards_explicitly():
            _place(model, self._mesh)
        return model


def _place(model: Any, mesh: Mesh) -> None:
    """Shard each parameter as the engine's loader does; the model's own spec may differ."""
    mappings = weight_mappings(model).values()
    specs: dict[str, Any] = {
        mapping.target_path: PartitionSpec(*mapping.sharding or ()) for mapping in mappings
    }

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        spec = specs.get(path_name(path), leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    nnx.update(model, jax.tree_util.tree_map_with_path(placed, nnx.state(model, nnx.Param)))


def params_of(model: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the parameters of an abstract model by path, in the order of its state."""
    state = nnx.state(model, nnx.Param)
    return dict(zip(param_paths(state), sharded_leaves(state, mesh), strict=True))


def sharded_leaves(state: Any, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Return the leaves of an abstract nnx state with the sharding that the engine gives them.

    With explicit sharding the leaf's type holds the partition; in 0.0.2 the parameter's metadata
    does.
    """
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
