"""Patches for upstream defects: one function each, with the affected versions and when it can go.

:func:`kvpipe.engine.sglang.start` applies them; :func:`construction` has those that any engine
needs. A patch does nothing in a version without its defect.
"""

import copy
import importlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh, PartitionSpec

from kvpipe.engine import lean_import
from kvpipe.system.versions import version_of

# The logit of a token that the engine's filters leave out.
_NO_LOGIT = -1e12

# The engine's default of chunked_prefill_size.
_CHUNK_TOKENS = 4096


def sgl_jax_version() -> str:
    """Return the version of the installed sglang-jax, with its commit if installed from git."""
    return version_of("sglang-jax")


def in_force() -> list[str]:
    """Return the names of the patches that change something in the installed version."""
    from jax._src import dtypes

    first = not shards_explicitly()
    needed = {
        pytree_registered_twice: first,
        sampler_off_tpu: first,
        bit_width_of_dtypes: not hasattr(dtypes, "bit_width"),
        seeded_sampling_is_random: True,
        min_p_of_probabilities: True,
        prefill_within_its_program: not first,
        page_table_of_each_batch_is_its_own: not first,
        config_of_each_engine_is_its_own: True,
        failure_signals_stay_here: True,
        exit_statuses_are_for_who_waits: True,
        failure_does_not_kill: True,
        watchdog_ends_with_its_engine: True,
        starts_no_second_runtime: True,
        scheduler_of_any_host: True,
        contexts_stay_open: True,
    }
    return [patch.__name__ for patch, is_needed in needed.items() if is_needed]


def shards_explicitly() -> bool:
    """Return whether the engine's mesh has explicit axes: from bd09a87 on, not in PyPI's 0.0.2.

    The version number cannot decide it: bd09a87 also calls itself 0.0.2.
    """
    with lean_import.lean():
        from sgl_jax.srt.utils import mesh_utils

    return hasattr(mesh_utils, "default_mesh_axes")


def import_engine() -> Any:
    """Import the modules that plans and runs need (takes seconds); return the worker's class."""
    with pytree_registered_twice(), lean_import.lean():
        importlib.import_module("sgl_jax.srt.layers.attention.native_backend")
        from sgl_jax.srt.managers.tp_worker import ModelWorker
    return ModelWorker


def device_mesh(tp_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh that the engine's scheduler makes of ``devices``, by default all of jax's."""
    experts = [] if shards_explicitly() else [1]  # only 0.0.2 has this axis
    from sgl_jax.srt.utils.mesh_utils import create_device_mesh

    return create_device_mesh([-1, tp_size, *experts], [1, 1, *experts], devices=devices)


def use_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """Return the context in which the engine makes its model on ``mesh``."""
    return jax.set_mesh(mesh) if shards_explicitly() else mesh


def in_engine_axes[**P, T](function: Callable[P, T], *shardings: Any) -> Callable[P, T]:
    """Return ``function`` for a program that leaves its shardings to XLA; it runs the engine's model.

    Args:
        function: runs the model.
        shardings: sharding of each of its arguments over the engine's mesh.
    """
    if not shards_explicitly():
        return function
    mesh = jax.tree.leaves(shardings)[0].mesh
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

    explicit_axes: Any = jax.sharding.explicit_axes

    def explicit(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.sharding.use_abstract_mesh(Mesh(mesh.devices, mesh.axis_names).abstract_mesh):
            return explicit_axes(function, in_sharding=specs)(*args, **kwargs)

    return explicit


def axes_left_to_xla[**P](function: Callable[P, jax.Array], spec: Any) -> Callable[P, jax.Array]:
    """Return ``function`` for the engine's model; its own shardings are left to XLA.

    Args:
        function: returns an array.
        spec: the partition of that array.
    """
    if not shards_explicitly():
        return function
    auto_axes: Any = jax.sharding.auto_axes
    return auto_axes(function, out_sharding=spec)


def shared_within(chunks: jax.Array) -> jax.Array:
    """Return chunks, along the first axis, whose devices share out each of them and not their number.

    A loop over the first axis takes no others; what was cut has its explicit sharding on that axis.
    """
    if not shards_explicitly():
        return chunks
    kind: Any = jax.typeof(chunks)
    first, second, *others = kind.sharding.spec
    return _resharded(chunks, PartitionSpec(None, first or second, *others))


def on_all(array: jax.Array) -> jax.Array:
    """Return an array that every device has whole, where shardings are explicit."""
    return _resharded(array, PartitionSpec()) if shards_explicitly() else array


def _resharded(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return an array in another explicit sharding; jax has the function, but no type of it."""
    jax_sharding: Any = jax.sharding
    return jax_sharding.reshard(array, spec)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set the attribute ``name`` of ``owner`` to ``value`` within the context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def pytree_registered_twice() -> Iterator[None]:
    """Tolerate the second pytree registration of NativeAttention while sgl_jax is imported.

    Defect: its base class is an nnx module, which flax has registered already, and jax raises
    "Duplicate custom PyTreeDef type registration".
    For: 0.0.2. Remove when 0.0.2 is no longer supported.
    """
    register = jax.tree_util.register_pytree_node_class

    def register_once(cls: Any) -> Any:
        try:
            return register(cls)
        except ValueError as error:
            if "Duplicate" not in str(error):
                raise
            return cls

    with replaced(jax.tree_util, "register_pytree_node_class", register_once):
        yield


def sampler_off_tpu() -> None:
    """Make the sampler take its TPU path on the CPU.

    Defect: the other path of 0.0.2 cannot unpack its operands; the TPU path is plain JAX.
    For: 0.0.2. Remove when 0.0.2 is no longer supported.
    """
    if shards_explicitly():
        return
    from sgl_jax.srt.layers import sampler

    sampler.is_tpu_runtime = lambda: True


def seeded_sampling_is_random() -> None:
    """Draw tokens with jax's random numbers, from the request's seed and the token's position.

    Defect: the engine hashes seed, position and token so that the noise of the tokens is not
    independent: over 65,536 seeds a token of probability 0.42 came 0.32 of the time (chi-squared
    930 times its degrees of freedom; 1.5 times with this patch).
    For: 0.0.2, bd09a87, HEAD. Remove when the engine's own draws as its probabilities say.
    """
    from sgl_jax.srt.layers import sampler

    unseeded = sampler.multinomial

    def drawn(operands: Any) -> Any:
        values, seeds, positions, _, *are_probabilities = operands
        if seeds is None:
            return unseeded(operands)
        logits = jnp.log(values) if any(are_probabilities) else values

        def of_row(row: jax.Array, seed: jax.Array, position: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), position)
            return jax.random.categorical(key, row)

        return jax.vmap(of_row)(logits, seeds, positions)[:, None]

    sampler.multinomial_with_seed = drawn


def min_p_of_probabilities() -> None:
    """Leave out the tokens whose probability is below the share ``min_p`` of the largest one.

    Defect: the engine compares logits as if they were probabilities, and sets those that it leaves
    out to 0, which is above any negative logit.
    For: 0.0.2, bd09a87, HEAD. Remove when the engine's own leaves out the right tokens.
    """
    from sgl_jax.srt.layers import sampler

    of_probabilities = sampler._apply_min_p_filter

    def filtered(operands: Any) -> Any:
        logits, shares, *are_probabilities = operands
        if any(are_probabilities):
            return of_probabilities(operands)
        least = logits.max(axis=1) + jnp.log(shares)  # log(0) is -inf: nothing is left out
        return jnp.where(logits < least[:, None], _NO_LOGIT, logits)

    sampler._apply_min_p_filter = filtered


def prefill_within_its_program(max_prefill_tokens: int, page_size: int) -> dict[str, int]:
    """Return the engine's arguments that keep a batch within the largest program of a prefill.

    Defect: the programs take ``max_prefill_tokens``, but batches of several requests are bounded by
    ``chunked_prefill_size`` alone, 4,096 by default; a larger batch kills the scheduler.
    For: HEAD (cddbf6f); it changes nothing for bd09a87's batches. Remove when the engine bounds them
    by both.
    """
    if not shards_explicitly() or max_prefill_tokens >= _CHUNK_TOKENS:
        return {}
    return {"chunked_prefill_size": max(page_size, max_prefill_tokens // page_size * page_size)}


def page_table_of_each_batch_is_its_own() -> None:
    """Give each batch a page table of its own.

    Defect: every batch writes its page table into one array of the host. Where that is aligned to
    64 bytes, which differs from process to process, the CPU's devices read it in place while the
    scheduler writes the next batch's: 2 of 5 rollouts of 128 requests had wrong tokens.
    For: HEAD (cddbf6f). Remove when the scheduler waits, or copies.
    """
    from sgl_jax.srt.managers.schedule_batch import ScheduleBatch

    merge = getattr(ScheduleBatch, "_merge_cache_loc", None)
    if merge is None or getattr(merge, "copies", False):
        return

    def merge_into_own(*args: Any, **kwargs: Any) -> Any:
        return merge(*args, **kwargs).copy()

    setattr(merge_into_own, "copies", True)  # noqa: B010 (a function has no such attribute)
    setattr(ScheduleBatch, "_merge_cache_loc", merge_into_own)  # noqa: B010 (nor has 0.0.2's class)


@contextmanager
def construction() -> Iterator[None]:
    """Apply the patches that an engine needs while it is constructed, by kvpipe or by a caller."""
    with (
        pytree_registered_twice(),  # the constructor imports the attention backend
        failure_signals_stay_here(),
        exit_statuses_are_for_who_waits(),
        contexts_stay_open(),
    ):
        sampler_off_tpu()
        bit_width_of_dtypes()
        seeded_sampling_is_random()
        min_p_of_probabilities()
        config_of_each_engine_is_its_own()
        page_table_of_each_batch_is_its_own()
        yield


def config_of_each_engine_is_its_own() -> None:
    """Give each model config its own copy of the Hugging Face config.

    Defect: the config is cached by path, and tensor parallelism writes the replicated number of KV
    heads into it; the next reader of the same model (a plan, a second engine) mistakes that number
    for the checkpoint's.
    For: 0.0.2, bd09a87, HEAD. Remove when the engine no longer writes into a cached config.
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

    Defect: the kernel of 0.0.2 uses a private jax function that 0.8.1 renamed, so it fails on every
    TPU with jax 0.8.1 and later, versions that its own requirements allow.
    For: 0.0.2. Remove when 0.0.2 is no longer supported.
    """
    from jax._src import dtypes

    if not hasattr(dtypes, "bit_width"):
        dtypes.bit_width = dtypes.itemsize_bits  # pyright: ignore[reportAttributeAccessIssue]


def kernel_sees(devices: Sequence[Any]) -> AbstractContextManager[None]:
    """Make ``jax.devices()`` return ``devices`` while the engine's code is traced.

    Defect: the attention kernel chooses its block sizes, and the engine its code paths, by
    ``jax.devices()``, even when they are lowered for other devices.
    For: 0.0.2, bd09a87, HEAD. Remove when they read the mesh that they are lowered for.
    """
    return replaced(jax, "devices", lambda *args, **kwargs: list(devices))


def failure_signals_stay_here() -> AbstractContextManager[None]:
    """Make psutil report this process as its own parent to the threads that the engine starts.

    Defect: a thread that fails sends SIGQUIT to the parent of its process, even when the engine
    runs in a single process; that parent is the user's shell or the run's supervisor.
    For: 0.0.2, bd09a87, HEAD. Remove when the engine raises its failures to the caller.
    """
    return replaced(psutil.Process, "parent", lambda self: self)


@contextmanager
def exit_statuses_are_for_who_waits() -> Iterator[None]:
    """Undo the handler of SIGCHLD that the engine sets while it is constructed.

    Defect: it takes the exit status of any child of this process, W&B's service included, so the code
    that waits for that child is told it succeeded; if there is none to take, it raises
    ChildProcessError in the main thread.
    For: 0.0.2, bd09a87, HEAD. Remove when the engine reaps its own children only.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)


def watchdog_ends_with_its_engine(scheduler: Any) -> None:
    """Let the watchdog of a scheduler that failed wait for no step any more.

    Defect: its thread lives on, and ``watchdog_timeout`` after a failure within a step it takes that
    step for one that hangs: it prints, and kills the process, which may have caught the failure.
    For: 0.0.2, bd09a87, HEAD. Remove when the watchdog ends with its scheduler.
    """
    scheduler.watchdog_timeout = threading.TIMEOUT_MAX  # seconds, some hundred years


def failure_does_not_kill(on_kill: Callable[[], None]) -> None:
    """Call ``on_kill`` where the engine would kill its process and all children.

    Defect: the engine answers an exception of a thread with SIGQUIT, and its handler kills the
    process tree; no caller can report or clean up.
    For: 0.0.2, bd09a87, HEAD. Remove when the engine raises its failures to the caller.
    """
    from sgl_jax.srt.entrypoints import engine

    engine.kill_process_tree = lambda *args, **kwargs: on_kill()


def starts_no_second_runtime() -> AbstractContextManager[None]:
    """Turn the scheduler's start of jax's distributed runtime into a no-op: kvpipe has started it.

    Defect: the scheduler always starts the runtime itself, so no engine can start in a process that
    has already queried jax's devices or started the runtime with its own timeouts.
    For: 0.0.2, bd09a87, HEAD. Remove when the engine accepts a runtime that is already running.
    """
    return replaced(jax.distributed, "initialize", lambda *args, **kwargs: None)


@contextmanager
def scheduler_of_any_host() -> Iterator[list[Any]]:
    """Capture the scheduler that the engine's constructor makes, on every host.

    Defect: on ranks after 0 the constructor never returns; or it returns without the scheduler, with
    SGLANG_BLOCK_NONZERO_RANK_CHILDREN=0, which :mod:`kvpipe.config.jax_environment` sets.
    For: 0.0.2, bd09a87, HEAD. Remove when ``scheduler_info`` exists on every host.

    Yields:
        A list that contains the scheduler once it is made.
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
    """Keep every ZeroMQ context made within this context alive until the process ends.

    Defect: the engine leaves its sockets open. When it is collected, pyzmq terminates the ZeroMQ
    context first and waits for its sockets to close; they would close later in the same collection,
    so it never returns, and no other thread can collect garbage any more.
    For: 0.0.2, bd09a87, HEAD with pyzmq 27.0.2. Remove when the engine closes its sockets itself.
    """
    import zmq

    make = zmq.Context.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        _open_contexts.append(self)

    with replaced(zmq.Context, "__init__", kept):
        yield
