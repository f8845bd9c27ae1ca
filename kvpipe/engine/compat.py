"""Patches for upstream defects: one function each, with its versions and the day it can go.

:func:`kvpipe.engine.sglang.start` applies them. Where a version does not have the defect, its patch
changes nothing.
"""

import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

_FIRST_VERSION = "0.0.2"


def sgl_jax_version() -> str:
    """Return the version of the installed sglang-jax."""
    return importlib.metadata.version("sglang-jax")


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
    if sgl_jax_version() != _FIRST_VERSION:
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


def failure_does_not_kill(on_kill: Callable[[], None]) -> None:
    """Call ``on_kill`` where the engine would kill its process and all children.

    Defect: the engine answers an exception of a thread with SIGQUIT, and its handler kills the
    process tree; no caller can report or clean up.
    For: 0.0.2, bd09a87, HEAD. Goes when the engine raises its failures to the caller.
    """
    from sgl_jax.srt.entrypoints import engine

    engine.kill_process_tree = lambda *args, **kwargs: on_kill()
