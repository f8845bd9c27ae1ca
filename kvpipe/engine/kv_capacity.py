"""Resize the KV cache: every token count in the engine, and the shapes of its buffers.

The longest request never exceeds the limit that the engine was started with, because its page
tables and padded batch sizes were built for that limit.
"""

from collections.abc import Callable
from typing import Any

import jax

from kvpipe.engine import compat
from kvpipe.engine.sglang import SglangEngine, pool_ranks
from kvpipe.errors import EngineError, InputError
from kvpipe.plan.pages import whole_pages
from kvpipe.units import counted


def pool_size(tokens: int, allocator: Any) -> int:
    """Return the size of the engine's KV pool for ``max_total_tokens=tokens``, in tokens.

    It is the sum of the capacities of the ranks that the pool is shared out to.

    Raises:
        InputError: ``tokens`` is less than a page.
    """
    page_size = allocator.page_size
    if tokens < page_size:
        least = f"a page of {counted(page_size, 'token')}"
        raise InputError(f"max_total_tokens is {tokens}, it must be at least {least}")
    return whole_pages(tokens, page_size) * pool_ranks(allocator)


def resize(engine: SglangEngine, tokens: int) -> None:
    """Set the capacity of a KV cache whose buffers are dropped; its shapes follow.

    For the scheduler's own thread, with no token in use. ``tokens`` are those of each data-parallel
    rank, rounded down to whole pages.

    Raises:
        EngineError: the capacity cannot hold any request.
        InputError: ``tokens`` is less than a page.
    """
    scheduler, runner = engine.scheduler, engine.runner
    pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
    size, ranks = pool_size(tokens, allocator), pool_ranks(allocator)
    tokens = size // ranks
    # The engine reserves one token of a request, and a few more of its prompt.
    margin = scheduler.max_req_len - scheduler.max_req_input_len
    longest = min(engine.longest_request, tokens - 1)
    if longest <= margin:
        raise EngineError(
            f"max_total_tokens: {tokens} tokens hold no request; it must be at least {margin + 2}"
        )
    pool.size = allocator.size = size
    pages = size // allocator.page_size
    _put(allocator, num_pages=pages, pages_per_rank=pages // ranks, size_per_rank=tokens)
    allocator.clear()
    if (free := allocator.available_size()) != tokens:
        raise EngineError(f"the engine's allocator gives {counted(free, 'token')}, not {tokens}")
    workers = (scheduler.tp_worker, scheduler.tp_worker.worker)
    for owner in (runner, scheduler, *workers, engine.engine.tokenizer_manager):
        _put(
            owner,
            max_total_num_tokens=size,
            max_req_len=longest,
            max_req_input_len=longest - margin,
        )
    abstract(type(pool)._create_buffers)(pool)


def _put(owner: Any, **values: int) -> None:
    """Set those attributes that this version of ``owner`` has."""
    for name, value in values.items():
        if hasattr(owner, name):
            setattr(owner, name, value)


def abstract(create_buffers: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a KV pool's ``create_buffers`` that creates shapes instead of buffers."""
    from sgl_jax.srt.mem_cache import memory_pool

    def zeros(shape: Any, dtype: Any, sharding: Any) -> Callable[[], jax.ShapeDtypeStruct]:
        return lambda: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def create(pool: Any) -> None:
        def traced() -> Any:
            create_buffers(pool)
            return pool.kv_buffer

        shapes = jax.eval_shape(traced)
        pool.kv_buffer = [
            jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool.kv_sharding)
            for shape in shapes
        ]

    def create_of_head(pool: Any) -> None:
        with compat.replaced(memory_pool, "_get_kv_zero_allocator", zeros):
            create_buffers(pool)

    return create_of_head if hasattr(memory_pool, "_get_kv_zero_allocator") else create
