"""The rounding of a KV cache's capacity to whole pages."""


def whole_pages(tokens: int, page_size: int) -> int:
    """Return the capacity that the engine gives for ``max_total_tokens=tokens``, in tokens.

    Less than a page gives 0. The formula is that of the engine's ``ModelRunner.init_memory_pool``
    (in HEAD ``_apply_token_constraints``). It is the capacity of one data-parallel rank: 0.0.2
    replicates the pool on every rank, HEAD multiplies it by their number afterwards and shards it
    over them. Either way a device has the rows of this capacity and of one page more.
    """
    return max(0, tokens // page_size * page_size)
