"""Start sglang-jax in this process, generate, flush, shut down.

One engine per process. :mod:`.kv_cache` and :mod:`.weights` change its KV cache and weights; every
change of the engine's state goes through :class:`SchedulerThread`.
"""

import atexit
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from kvpipe.config.schema import EngineConfig, SamplingConfig
from kvpipe.engine import compat, lean_import, memory, multihost
from kvpipe.engine.devices import check_devices
from kvpipe.engine.digests import Proof
from kvpipe.engine.failure import FailureWatch
from kvpipe.engine.requests import IN_FLIGHT, Requests, guards, in_batch
from kvpipe.engine.rollout_hooks import RolloutHooks
from kvpipe.engine.scheduler_thread import CallerThread, SchedulerThread
from kvpipe.errors import EngineError, InputError
from kvpipe.pipeline.output import Output
from kvpipe.plan.pages import whole_pages
from kvpipe.records import progress

# Options that are no argument of the engine under their own name.
_NOT_OF_THE_ENGINE = ("virtual_devices", "precompile", "weight_digests")
# The engine that somebody else made and kvpipe has the handles on; one at a time, as their threads
# share a log and a way to signal.
_adopted: "weakref.ref[SglangEngine] | None" = None


@dataclass
class SglangEngine:
    """A live engine and the handles on it that kvpipe needs.

    Attributes:
        engine: ``sgl_jax.srt.entrypoints.engine.Engine``.
        scheduler: its scheduler, which owns the loop, the prefix cache and the request pool.
        runner: its model runner, which owns the model, the KV cache and the compiled step.
        on_scheduler: runs functions on the scheduler's thread when idle.
        on_caller: makes the blocking front-end calls.
        requests: refuses requests while the engine cannot generate.
        failure: detects that a thread of the engine has failed.
        longest_request: longest request, in tokens, that its tables were built for.
        proves_weights: whether digests hold its weights against their source.
        rollouts: holds the requests of a rollout together, and has their log-probabilities; None for an
            engine that the caller made.
        proof: the digests of its weights; of offloaded ones those that they had.
        cache_digests: digests of the weights that the prefix cache was written under.
        generated: whether it has generated.
        positions: where each parameter is in the list of the compiled step, by path; it never changes,
            so it is looked up once.
    """

    engine: Any
    scheduler: Any
    runner: Any
    on_scheduler: SchedulerThread
    on_caller: CallerThread
    requests: Requests
    failure: FailureWatch
    longest_request: int
    proves_weights: bool
    rollouts: RolloutHooks | None = None
    proof: Proof = field(default_factory=Proof)
    cache_digests: frozenset[str] = frozenset()
    generated: bool = False
    positions: dict[str, int] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Version of sglang-jax."""
        return compat.sgl_jax_version()

    @property
    def unavailable(self) -> dict[str, str]:
        """Reason → remedy for everything that generating needs and that is missing now."""
        return self.requests.unavailable

    @property
    def in_flight(self) -> bool:
        """Whether a rollout is paused with requests half-way."""
        return IN_FLIGHT in self.unavailable

    @property
    def max_total_tokens(self) -> int:
        """Capacity of the KV cache on each data-parallel rank, in tokens.

        While the cache is dropped, it is the capacity that it had.
        """
        ranks = pool_ranks(self.runner.token_to_kv_pool_allocator)
        return self.scheduler.max_total_num_tokens // ranks

    def wait_idle(self) -> None:
        """Return once the engine is idle and no step holds its buffers.

        Raises:
            EngineError: it failed or stayed busy.
        """
        self.on_scheduler.call(lambda: None)

    def generate(self, prompt: str, sampling: SamplingConfig) -> Output:
        """Generate from ``prompt`` and return once the engine is idle again.

        Raises:
            EngineError: the engine cannot generate now, or failed.
        """
        params = parameters(sampling, sampling.seed or 0)
        with (
            progress.under_way(
                progress.GENERATING, {progress.TOKENS: sampling.max_new_tokens}, self._tokens_so_far
            ),
            self.generating() as origin,
        ):
            raw = self._answer(prompt, params)
        return Output(
            text=raw["text"],
            token_ids=tuple(int(token) for token in raw["output_ids"]),
            prompt_tokens=int(raw["meta_info"]["prompt_tokens"]),
            cached_tokens=int(raw["meta_info"]["cached_tokens"]),
            raw=raw,
            stopped=(raw["meta_info"]["finish_reason"] or {}).get("type") == "stop",
            **origin,
        )

    @contextmanager
    def generating(self) -> Iterator[dict[str, Any]]:
        """Generate in the block, and wait until no step of the engine is under way.

        What it yields has, after the block, ``forward_steps``, ``weights_digest`` and
        ``cache_digests`` of :class:`kvpipe.pipeline.output.Output`.

        Raises:
            EngineError: the engine cannot generate now, failed or stayed busy.
        """
        self.requests.check()
        steps, digest, cached = self.scheduler.forward_ct, self.proof.whole, self.cache_digests
        origin: dict[str, Any] = {"weights_digest": digest, "cache_digests": tuple(sorted(cached))}
        self.generated = True
        # All hosts get here before the first sends a request, which their engines compute at once.
        multihost.each(True)
        yield origin
        self.wait_idle()
        if digest is not None:
            self.cache_digests = cached | {digest}
        origin["forward_steps"] = self.scheduler.forward_ct - steps

    def _answer(self, prompt: str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's answer as JSON types.

        The first host sends the request; its engine forwards it to the other hosts' engines, which
        compute with it. The other hosts then receive the first host's answer.
        """
        raw = None
        if multihost.rank() == 0:
            raw = json_plain(
                self.on_caller.call(
                    lambda: self.engine.generate(prompt=prompt, sampling_params=params)
                )
            )
        return multihost.of_first(raw, self.failure.raise_if_failed)

    def _tokens_so_far(self) -> dict[str, int]:
        """Return the tokens that the running requests have so far; safe from any thread."""
        names = ("running_batch", "cur_batch", "last_batch")
        batches = [getattr(self.scheduler, name, None) for name in names]
        requests = {id(r): r for batch in batches if batch is not None for r in in_batch(batch)}
        return {progress.TOKENS: sum(len(request.output_ids) for request in requests.values())}

    def flush(self) -> dict[str, int]:
        """Empty the prefix cache and both pools; return the number of tokens that were cached.

        Raises:
            EngineError: requests are in flight, or tokens are still in use afterwards.
        """
        return self.on_scheduler.call(self.flush_now)

    def flush_now(self) -> dict[str, int]:
        """Flush as :meth:`flush` does, for functions that already run on the scheduler's thread."""
        if self.in_flight:
            raise EngineError(f"the prefix cache cannot be flushed: {self.unavailable[IN_FLIGHT]}")
        runner, scheduler, capacity = self.runner, self.scheduler, self.max_total_tokens
        cached = capacity - runner.token_to_kv_pool_allocator.available_size()
        scheduler.tree_cache.reset()
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        free = runner.token_to_kv_pool_allocator.available_size()
        if free != capacity:
            raise EngineError(f"after the flush {free} tokens are free, not all {capacity}")
        self.cache_digests = frozenset()
        return {"flushed_tokens": cached, "free_tokens": free}

    def flush_for_other_weights(self) -> None:
        """Flush, on the scheduler's thread, unless requests are in flight, whose tokens would go too.

        They continue under the new weights, with the KV entries that the old ones computed.
        """
        if not self.in_flight:
            self.flush_now()

    def shut_down(self) -> None:
        """End the engine's threads and release its buffers; child processes stay alive.

        The engine's own shutdown kills every child of this process, W&B's service included.
        """
        atexit.unregister(self.engine.shutdown)
        if not self.failure.happened:
            self.on_scheduler.stop()
        self.engine.send_to_rpc.close()


def start(config: EngineConfig, model_dir: Path, idle_timeout_s: float) -> SglangEngine:
    """Start the engine in this process; a ``tp_size`` of None uses all devices.

    The model's directory has config.json, tokenizer and, unless dummy, safetensors. Each later call
    waits up to ``idle_timeout_s`` seconds for the engine to become idle.

    Raises:
        InputError: tp × dp is not the device count.
        EngineError: it did not start, or cut the KV cache's capacity down.
    """
    check_devices(config)
    failure = FailureWatch()
    compat.import_engine()
    with (
        lean_import.lean(),
        compat.construction(),
        failure.starting(),
        compat.starts_no_second_runtime(),
        compat.scheduler_of_any_host() as made,
    ):
        from sgl_jax.srt.entrypoints.engine import Engine
        from sgl_jax.srt.server_args import ServerArgs

        compat.failure_does_not_kill(failure.on_kill)
        arguments = ServerArgs(**server_arguments(config, model_dir, ServerArgs))
        engine = _constructed(Engine, arguments)
    (scheduler,) = made
    failure.watch()
    started = _with_handles(engine, scheduler, failure, idle_timeout_s, config.weight_digests)
    started.rollouts = RolloutHooks(scheduler, started.on_scheduler)
    memory.exclude_what_lives()  # much of it lives as long as the process
    _check_capacity(started, config)
    return started


def adopt(engine: Any, idle_timeout_s: float, proves_weights: bool) -> SglangEngine:
    """Take the handles on an engine that the caller made; :func:`let_go` gives it back.

    Its process is the caller's, so no signal handler and no part of the garbage collection changes.

    Raises:
        InputError: it is no Engine, runs in processes of its own or on several hosts, or kvpipe has
            the handles on it, or on another adopted one, already.
    """
    global _adopted
    scheduler = _scheduler_of(engine)
    if _adopted is not None and _adopted() is not None:
        raise InputError("attach: another engine is attached already; detach it first")
    adopted = _with_handles(engine, scheduler, FailureWatch(), idle_timeout_s, proves_weights)
    _adopted = weakref.ref(adopted)
    return adopted


def let_go(adopted: SglangEngine) -> None:
    """Leave an engine as it was before :func:`adopt`, once it is idle.

    Raises:
        EngineError: it lacks its KV cache or its weights, failed or stayed busy.
    """
    global _adopted
    if not adopted.failure.happened:
        adopted.requests.check()
        adopted.on_scheduler.call(adopted.on_scheduler.unhook)
    adopted.requests.unguard()
    adopted.failure.end()
    _adopted = None


def _scheduler_of(engine: Any) -> Any:
    """Return the scheduler of an engine that can be adopted."""
    arguments = getattr(engine, "server_args", None)
    if arguments is None or not hasattr(engine, "scheduler_info"):
        raise InputError(f"attach: {engine!r} is not an Engine of sglang-jax")
    if arguments.nnodes > 1:
        raise InputError(f"attach: the engine runs on {arguments.nnodes} hosts; it must be on one")
    scheduler = engine.scheduler_info.get("scheduler")
    if scheduler is None:
        raise InputError(
            "attach: the engine runs in processes of its own; construct it with "
            "enable_single_process=True"
        )
    if guards(engine.tokenizer_manager):
        raise InputError("attach: this engine is attached already; detach it first")
    return scheduler


def _with_handles(
    engine: Any, scheduler: Any, failure: FailureWatch, idle_timeout_s: float, proves_weights: bool
) -> SglangEngine:
    failure.of(scheduler)
    requests = Requests(engine.tokenizer_manager, failure)
    return SglangEngine(
        engine=engine,
        scheduler=scheduler,
        runner=scheduler.tp_worker.worker.model_runner,
        on_scheduler=SchedulerThread(scheduler, requests, failure, idle_timeout_s),
        on_caller=CallerThread(failure),
        requests=requests,
        failure=failure,
        longest_request=scheduler.max_req_len,
        proves_weights=proves_weights,
    )


def pool_ranks(allocator: Any) -> int:
    """Return the number of data-parallel ranks that the KV pool is shared out to.

    0.0.2 and bd09a87 give every rank a whole pool, and their allocator counts a single one.
    """
    return getattr(allocator, "dp_size", 1)


def _constructed(engine_class: Any, arguments: Any) -> Any:
    """Construct the engine; if that fails, leave no exit handler behind.

    Its constructor first registers its shutdown, which raises AttributeError on a partial engine.
    """
    engine = engine_class.__new__(engine_class)
    try:
        engine.__init__(server_args=arguments)
    except BaseException:
        atexit.unregister(engine.shutdown)
        raise
    return engine


def server_arguments(config: EngineConfig, model_dir: Path, accepted: Any) -> dict[str, Any]:
    """Return the engine's arguments under the names that the installed ``ServerArgs`` accepts."""
    of_engine = {k: v for k, v in asdict(config).items() if k not in _NOT_OF_THE_ENGINE}
    later = "disable_jax_precompile" not in accepted.__dataclass_fields__
    path = str(model_dir.resolve())
    of_engine |= compat.prefill_within_its_program(config.max_prefill_tokens, config.page_size)
    return of_engine | {
        "model_path": path,
        "tokenizer_path": path,
        "tp_size": config.tp_size or jax.device_count() // config.dp_size,
        "node_rank": config.node_rank or 0,
        "enable_single_process": True,
        "skip_server_warmup": True,
        # Without it every step draws with one fixed key, so all samples of a prompt are the same.
        "enable_deterministic_sampling": True,
        "disable_precompile" if later else "disable_jax_precompile": not config.precompile,
    }


def _check_capacity(engine: SglangEngine, config: EngineConfig) -> None:
    asked = whole_pages(config.max_total_tokens, config.page_size)
    given = engine.max_total_tokens
    if given != asked:
        raise EngineError(
            f"engine.max_total_tokens: the engine cut {asked} tokens down to {given}, which is what "
            f"fits mem_fraction_static={config.mem_fraction_static:g} of the free memory"
        )


def parameters(sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Return the engine's sampling parameters of one request."""
    return {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "ignore_eos": sampling.ignore_eos,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "sampling_seed": seed,
    }


def json_plain(answer: Any) -> Any:
    """Convert an engine's answer to JSON types; its scalars may be numpy's."""

    def scalar(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    return json.loads(json.dumps(answer, default=scalar))
