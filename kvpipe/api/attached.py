"""The verbs of the phases in a loop of one's own, on an engine that the caller has made.

Each verb runs the phase of its name in ``phases/``, so it has the same guards, makes the same checks
and gives the same texts. What fails a run is an exception here.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, override

import jax
import numpy as np

from kvpipe.config.schema import EngineConfig, Kvpipe, RunnerConfig
from kvpipe.engine import compat, kv_cache, memory, sglang, training, weights
from kvpipe.engine.sglang import SglangEngine
from kvpipe.errors import CheckFailed, EngineError, InputError, KvpipeError, failure_of
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.ledger import Ledger
from kvpipe.pipeline.phase import Result, WorkerPhase, grown, result_of
from kvpipe.pipeline.phase_files import phase_class
from kvpipe.worker import measurement
from kvpipe.worker.loop import explain

Array = np.ndarray[Any, Any] | jax.Array
CarryOut = Callable[[str, WorkerPhase], Mapping[str, Any]]
"""Carries a phase out, given the name of its file, and returns the fields that it reports."""


def attach(
    engine: Any, *, idle_timeout_s: float = RunnerConfig.idle_timeout_s, weight_digests: bool = True
) -> "Attached":
    """Take hold of a live ``sgl_jax`` Engine that runs in this process.

    Args:
        engine: an Engine with ``enable_single_process=True`` on one host.
        idle_timeout_s: seconds that a verb waits for the engine to become idle.
        weight_digests: prove after each change of the weights that every parameter is its source's;
            False saves the time.

    Raises:
        InputError: it is no such engine, or is attached already.
    """
    return Attached(sglang.adopt(engine, idle_timeout_s, weight_digests))


def engine_patches() -> AbstractContextManager[None]:
    """Return the context to construct an Engine in: it patches the installed sglang-jax.

    0.0.2 starts on a CPU only in it. In any version a thread that fails while the engine is being
    made then signals this process, and not its parent.
    """
    return compat.construction()


class Attached:
    """A live engine with the verbs of the phases; :func:`attach` makes it.

    While a verb works, and within the blocks of those that release something, every request to the
    engine raises :class:`EngineError`; requests that are under way are answered first. Verbs may be
    called from any thread, one at a time.

    Each verb raises :class:`EngineError` if the engine failed, stayed busy or cannot do it now,
    :class:`CheckFailed` if a check of its phase does not hold (bytes that did not come free, weights
    that are not their source's) and :class:`OutOfMemory`.
    """

    def __init__(self, adopted: SglangEngine) -> None:
        """Use :func:`attach`."""
        config = Kvpipe(pipeline=[], engine=EngineConfig(max_total_tokens=adopted.max_total_tokens))
        self._ctx = WorkerContext(config, prompt="", jax_ready=True, started=adopted)
        self._lock = threading.RLock()
        self._signals = ExitStack()
        self._signals.enter_context(adopted.failure.instead_of_signals())
        self._carry_out: CarryOut = self._plainly

    @contextmanager
    def kv_released(self) -> Iterator[int]:
        """Free the KV cache within the block; its contents are lost, the prefix cache too.

        At the end of the block, also after an exception, the devices have the cache again, empty.

        Yields:
            The bytes that came free, over all devices.
        """
        kv_cache.needs_kv(self._engine)
        try:
            yield self._do("flush_cache", "kv_cache_dropped")["drop_info"]["freed_bytes"]
        finally:
            self._bring_kv_back()

    @contextmanager
    def kv_offloaded(self) -> Iterator[int]:
        """Free the KV cache within the block and keep its used part on the host.

        At the end of the block every prefix is back, unless it was flushed, as :meth:`sync` does.

        Yields:
            The bytes that came free, over all devices.
        """
        kv_cache.needs_kv(self._engine)
        try:
            yield self._do("kv_cache_offloaded")["drop_info"]["freed_bytes"]
        finally:
            self._bring_kv_back()

    @contextmanager
    def weights_released(self, *, keep: bool = True) -> Iterator[int]:
        """Free the engine's weights within the block.

        A :meth:`sync` in the block brings others. Without one the engine's own come back from the
        host at the end; with ``keep=False`` they are lost, and the engine generates again only after
        a :meth:`sync`.

        Yields:
            The bytes that came free, over all devices.
        """
        weights.needs_weights(self._engine)
        if keep:  # since the last proof the caller may have placed others
            weights.take_digests(self._engine)
        try:
            yield self._do("weights_offloaded" if keep else "weights_dropped")["freed_bytes"]
        finally:
            if self._ctx.host_weights is not None:
                self._do("weights_restored")

    def sync(self, named_arrays: Mapping[str, Array]) -> str | None:
        """Replace the engine's weights leaf by leaf, never with a second set, and flush its prefixes.

        Args:
            named_arrays: every tensor of the checkpoint by its Hugging Face name, in that layout
                ([out, in] for a linear layer, each KV head once) and of any float dtype: all of
                NumPy, also mapped from files, or all of jax on exactly the engine's devices.

        Returns:
            The digest of the engine's weights; None without ``weight_digests``.

        Raises:
            WeightsError: a tensor is missing, unexpected, misshapen or not finite; the engine keeps
                its weights.
            InputError: an array is neither, or on other devices.
        """
        _check_kind(named_arrays, set(self._engine.runner.mesh.devices.flat))
        on_devices = any(isinstance(array, jax.Array) for array in named_arrays.values())
        use = "weights_synced" if on_devices else "weights_streamed"
        self._do_all({use: _Sync(step=use, named_arrays=named_arrays, on_devices=on_devices)})
        return self._engine.proof.whole

    def memory(self) -> Ledger:
        """Return the bytes of every live array on each local device, by pool, once the engine is idle.

        The pools are ``params``, ``kv`` and, for all else in the process, ``other``; where the devices
        count by themselves also ``program`` and ``padding``.
        """
        with self._lock:
            self._engine.wait_idle()
            memory.wait_for_arrays()
            ledger = measurement.measure(self._ctx, describes=False).ledger
            assert ledger is not None
            return ledger

    def detach(self) -> None:
        """Leave the engine as it was before; no verb works any more.

        Raises:
            EngineError: it lacks its KV cache or its weights.
        """
        with self._lock:
            sglang.let_go(self._engine)
            self._signals.close()
            self._ctx.started = None

    @contextmanager
    def _carried_out_by(self, carry_out: CarryOut) -> Iterator[None]:
        """Let ``carry_out`` run the phases within the context, as :mod:`.recording` does.

        Raises:
            InputError: something else does already.
        """
        with self._lock:
            if self._carry_out != self._plainly:
                raise InputError("record: the verbs of this engine are recorded already")
            self._carry_out = carry_out
        try:
            yield
        finally:
            self._carry_out = self._plainly

    @property
    def _engine(self) -> SglangEngine:
        if self._ctx.started is None:
            raise EngineError("the engine is detached; attach it again")
        return self._ctx.started

    def _bring_kv_back(self) -> None:
        """Make the KV cache again, also after a check that did not hold; not if it is still there."""
        if kv_cache.KV in self._engine.unavailable:
            kept = self._ctx.host_kv
            has_prefixes = kept is not None and kv_cache.holds_used_rows(self._engine, kept)
            self._do("kv_cache_restored" if has_prefixes else "kv_cache_rebuilt")

    def _do(self, *uses: str) -> Mapping[str, Any]:
        phases = [phase_class(use)(step=use) for use in uses]
        return self._do_all({use: p for use, p in zip(uses, phases, strict=True)})

    def _do_all(self, phases: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry phases out without a request between them; return the fields of the last one."""
        fields: Mapping[str, Any] = {}
        with self._lock, self._engine.requests.refused(), memory.lives_excluded():
            for use, phase in phases.items():
                fields = self._carry_out(use, phase)
        return fields

    def _plainly(self, use: str, phase: WorkerPhase) -> Mapping[str, Any]:
        try:
            result = result_of(phase, self._ctx)
        except KvpipeError:
            raise
        except Exception as error:
            raise failure_of(use, error) from error
        if not all(check.passed for check in result.checks):
            raise CheckFailed(explain(use, result.checks))
        return result.fields


class _Sync(WorkerPhase):
    """Bring the caller's arrays in, as the phases do with a checkpoint's or a trainer's."""

    named_arrays: Mapping[str, Any]
    on_devices: bool

    @override
    def run(self, ctx: WorkerContext) -> Result:
        if self.on_devices:
            change = training.sync(ctx.engine, self.named_arrays)
        else:
            change = weights.stream(ctx.engine, self.named_arrays)
        ctx.host_kv = ctx.host_weights = None
        return grown("sync_leaves_one_set", change, *ctx.engine.proof.checks)


def _check_kind(named_arrays: Mapping[str, Any], devices: set[Any]) -> None:
    """Refuse arrays that are neither all on the host nor all on the engine's devices."""
    first = None
    for name, array in named_arrays.items():
        if not isinstance(array, np.ndarray | jax.Array):
            kind = type(array).__name__
            raise InputError(f"sync: {name!r} is of type {kind}, not an array of numpy or jax")
        if isinstance(array, jax.Array) and array.sharding.device_set != devices:
            raise InputError(
                f"sync: {name!r} is on {_names(array.sharding.device_set)}, but the engine is on "
                f"{_names(devices)}; move it with jax.device_put, or give numpy arrays"
            )
        first = first or (name, isinstance(array, jax.Array))
        if isinstance(array, jax.Array) != first[1]:
            raise InputError(
                f"sync: of {first[0]!r} and {name!r} one is on the host, the other on the devices; "
                "give all arrays in one place"
            )


def _names(devices: set[Any]) -> str:
    return ", ".join(sorted(map(str, devices)))
