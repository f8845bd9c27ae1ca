"""Patches for upstream defects: one function each, with its versions and the day it can go.

:func:`kvpipe.engine.sglang.start` applies them. Where a version does not have the defect, its patch
changes nothing.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from kvpipe.versions import version_of


def sgl_jax_version() -> str:
    """Return the version of the installed sglang-jax, with its commit if it is from git."""
    return version_of("sglang-jax")


def in_force() -> list[str]:
    """Return the names of the patches that change something in the installed version."""
    from jax._src import dtypes

    first = not shards_explicitly()
    needed = {
        pytree_registered_twice: first,
        sampler_off_tpu: first,
        bit_width_of_dtypes: not hasattr(dtypes, "bit_width"),
        config_of_each_engine_is_its_own: True,
        failure_signals_stay_here: True,
        failure_does_not_kill: True,
        starts_no_second_runtime: True,
        scheduler_of_any_host: True,
        contexts_stay_open: True,
    }
    return [patch.__name__ for patch, is_needed in needed.items() if is_needed]


def shards_explicitly() -> bool:
    """Return whether the engine's mesh has explicit axes: from bd09a87 on, not in PyPI's 0.0.2.

    The version does not tell: bd09a87 calls itself 0.0.2 too.
    """
    from sgl_jax.srt.utils import mesh_utils

    return hasattr(mesh_utils, "default_mesh_axes")


def device_mesh(tp_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh that the engine's scheduler makes of ``devices``, or of all that jax has."""
    from sgl_jax.srt.utils.mesh_utils import create_device_mesh

    experts = [] if shards_explicitly() else [1]  # an axis of 0.0.2 alone
    return create_device_mesh([-1, tp_size, *experts], [1, 1, *experts], devices=devices)


def use_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """Return the context in which the engine makes its model on ``mesh``."""
    return jax.set_mesh(mesh) if shards_explicitly() else mesh


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let the attribute ``name`` of ``owner`` be ``value`` for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def pytree_registered_twice() -> Iterator[None]:
    """Let NativeAttention register itself as a pytree a second time while sgl_jax is imported.

    Defect: its base class is an nnx module, which flax has registered already, and jax raises
    "Duplicate custom PyTreeDef type registration".
    For: 0.0.2. Goes when 0.0.2 is no longer supported.
    """
    original = jax.tree_util.register_pytree_node_class

    def register_once(cls: Any) -> Any:
        try:
            return original(cls)
        except ValueError as error:
            if "Duplicate" not in str(error):
                raise
            return cls

    jax.tree_util.register_pytree_node_class = register_once
    try:
        yield
    finally:
        jax.tree_util.register_pytree_node_class = original


def sampler_off_tpu() -> None:
    """Let the sampler take its TPU path on the CPU.

    Defect: the other path of 0.0.2 cannot unpack its operands; the TPU path is plain JAX.
    For: 0.0.2. Goes when 0.0.2 is no longer supported.
    """
    if shards_explicitly():
        return
    from sgl_jax.srt.layers import sampler

    sampler.is_tpu_runtime = lambda: True


def config_of_each_engine_is_its_own() -> None:
    """Give each model config its own copy of the Hugging Face config.

    Defect: the config is cached by path, and tensor parallelism writes the replicated number of KV
    heads into it; who reads the same model afterwards (a plan, a second engine) takes that number
    for the checkpoint's.
    For: 0.0.2, bd09a87, HEAD. Goes when the engine no longer writes into a cached config.
    """
    from sgl_jax.srt.configs import model_config

    get_config = model_config.get_config
    if getattr(get_config, "copies", False):
        return

    def get_own_config(*args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(get_config(*args, **kwargs))

    setattr(get_own_config, "copies", True)  # noqa: B010 (a function has no such attribute)
    model_config.get_config = get_own_config


def bit_width_of_dtypes() -> None:
    """Give ``jax._src.dtypes`` the ``bit_width`` that the attention kernel calls.

    Defect: the kernel of 0.0.2 uses a private function of jax that 0.8.1 renamed, so that it fails
    on every TPU with jax 0.8.1 and later, which its own requirements allow.
    For: 0.0.2. Goes when 0.0.2 is no longer supported.
    """
    from jax._src import dtypes

    if not hasattr(dtypes, "bit_width"):
        dtypes.bit_width = dtypes.itemsize_bits  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def kernel_sees(devices: Sequence[Any]) -> Iterator[None]:
    """Let what the engine traces take ``devices`` for those of this machine.

    Defect: the attention kernel chooses its block sizes, and the engine its paths, by
    ``jax.devices()``, also when it is lowered for other devices.
    For: 0.0.2, bd09a87, HEAD. Goes when they ask the mesh that they are lowered for.

    Args:
        devices: the target's devices, as a topology describes them.
    """
    original = jax.devices
    jax.devices = lambda *args, **kwargs: list(devices)
    try:
        yield
    finally:
        jax.devices = original


@contextmanager
def failure_signals_stay_here() -> Iterator[None]:
    """Let the threads that the engine starts take this process for its own parent.

    Defect: a thread that fails sends SIGQUIT to the parent of its process, also where the engine
    runs in one process; that is the user's shell, or who supervises the run.
    For: 0.0.2, bd09a87, HEAD. Goes when the engine raises its failures to the caller.
    """
    original = psutil.Process.parent
    psutil.Process.parent = lambda self: self
    try:
        yield
    finally:
        psutil.Process.parent = original


def failure_does_not_kill(on_kill: Callable[[], None]) -> None:
    """Call ``on_kill`` where the engine would kill its process and all children.

    Defect: the engine answers an exception of a thread with SIGQUIT, and its handler kills the
    process tree; no caller can report or clean up.
    For: 0.0.2, bd09a87, HEAD. Goes when the engine raises its failures to the caller.
    """
    from sgl_jax.srt.entrypoints import engine

    engine.kill_process_tree = lambda *args, **kwargs: on_kill()


@contextmanager
def starts_no_second_runtime() -> Iterator[None]:
    """Let the scheduler's start of jax's distributed runtime do nothing: kvpipe has started it.

    Defect: the scheduler starts it itself, and whoever has asked jax for its devices before, or has
    started it with time limits of his own, cannot start an engine any more.
    For: 0.0.2, bd09a87, HEAD. Goes when the engine takes a runtime that is there.
    """
    with replaced(jax.distributed, "initialize", lambda *args, **kwargs: None):
        yield


@contextmanager
def scheduler_of_any_host() -> Iterator[list[Any]]:
    """Give the scheduler that the engine's constructor makes, on hosts after the first too.

    Defect: there the constructor never returns, or with SGLANG_BLOCK_NONZERO_RANK_CHILDREN=0, which
    :mod:`kvpipe.jax_environment` sets, it returns without the scheduler.
    For: 0.0.2, bd09a87, HEAD. Goes when ``scheduler_info`` is there on every host.

    Yields:
        A list that has the scheduler once it is made.
    """
    from sgl_jax.srt.entrypoints import engine

    made: list[Any] = []
    make = engine.run_scheduler_loop_thread_after_create

    def kept(*args: Any, **kwargs: Any) -> Any:
        info = make(*args, **kwargs)
        if info is not None:
            made.append(info["scheduler"])
        return info

    with replaced(engine, "run_scheduler_loop_thread_after_create", kept):
        yield made


_open_contexts: list[Any] = []


@contextmanager
def contexts_stay_open() -> Iterator[None]:
    """Keep each ZeroMQ context that is made meanwhile for as long as the process lives.

    Defect: the engine leaves its sockets open. Once it is garbage, pyzmq ends their context first and
    waits in there for the sockets to be closed, which the same collection would do later: it never
    returns, and no thread of the process collects garbage any more.
    For: 0.0.2, bd09a87, HEAD with pyzmq 27.0.2. Goes when the engine closes its sockets itself.
    """
    import zmq

    make = zmq.Context.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        _open_contexts.append(self)

    with replaced(zmq.Context, "__init__", kept):
        yield
