"""Changes of a live engine leave no array behind that no pool owns, not even one of four bytes.

The engine is fresh: what an earlier change had left behind would hide that the next one does too.
"""

from collections.abc import Callable
from typing import Any

import pytest

from kvpipe.checkpoints.safetensors import Tensors
from kvpipe.pipeline.ledger import OTHER

pytestmark = pytest.mark.slow


def test_a_swap_a_stream_a_drop_and_a_rebuild_leave_no_array_that_no_pool_owns(
    engine: Any, tiny_weights: Tensors
) -> None:
    from kvpipe.engine import kv_cache, memory, weights

    def unowned() -> int:
        owned = weights.parameters(engine).values()
        return memory.measure(owned, kv_cache.buffers(engine), {})[0].sum_of(OTHER)

    changes: dict[str, Callable[[], object]] = {
        "swap": lambda: weights.swap(engine, weights.build(engine, tiny_weights)),
        "stream": lambda: weights.stream(engine, tiny_weights),
        "drop": lambda: kv_cache.drop(engine),
        "rebuild": lambda: kv_cache.rebuild(engine),
    }
    before, left = unowned(), {}
    for name, change in changes.items():
        change()
        left[name] = unowned() - before
    assert left == dict.fromkeys(changes, 0)
