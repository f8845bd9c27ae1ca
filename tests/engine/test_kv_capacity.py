from types import SimpleNamespace

import pytest

from kvpipe.engine.kv_capacity import pool_size
from kvpipe.pipeline.ledger import Size
from kvpipe.plan.fit import KvCapacity, fit_of
from kvpipe.plan.fold import check_order, plan_ledgers
from tests.helpers_config import build, default_names
from tests.refusal import refusal

PARAMS, TOKEN = 1_000_003, 96


def allocator(page_size, ranks):
    """Return what HEAD's allocator says of itself; those of 0.0.2 and bd09a87 have no dp_size."""
    return SimpleNamespace(page_size=page_size, dp_size=ranks)


def bytes_of_a_device(tokens, page_size, ranks):
    """Return the KV bytes of a device as HEAD's MHATokenToKVPool._create_buffers computes them."""
    rows = pool_size(tokens, allocator(page_size, ranks)) + page_size * ranks
    assert rows % ranks == 0
    return rows // ranks * TOKEN


def fit(hbm_bytes, tokens, page_size, ranks):
    planned = check_order(build(default_names()))
    kv = bytes_of_a_device(tokens, page_size, ranks)
    sizes = {Size.PARAMS: (PARAMS,) * ranks, Size.KV: (kv,) * ranks, Size.PROGRAM: (0,) * ranks}
    ledgers = plan_ledgers(planned, sizes, devices=ranks)
    return fit_of(planned, ledgers, hbm_bytes, KvCapacity(kv, tokens, page_size))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_largest_capacity_fits_the_pool_of_any_number_of_ranks_and_one_page_more_does_not(
    ranks, page_size
):
    hbm_bytes = 2 * PARAMS + TOKEN * (64 * page_size + page_size) + TOKEN - 1
    asked = fit(hbm_bytes, 640 * page_size, page_size, ranks)
    most = asked.max_total_tokens
    assert (asked.fits, most) == (False, 64 * page_size)
    assert fit(hbm_bytes, most, page_size, ranks).fits
    assert not fit(hbm_bytes, most + page_size, page_size, ranks).fits


def test_each_data_parallel_rank_gets_the_whole_pages_of_the_capacity():
    assert pool_size(1000, allocator(16, 1)) == 992
    assert pool_size(1000, allocator(16, 2)) == 2 * 992
    assert pool_size(1000, SimpleNamespace(page_size=16)) == 992


def test_a_capacity_below_a_page_is_refused_with_both_numbers():
    assert (
        refusal(pool_size, 15, allocator(16, 2))
        == "max_total_tokens is 15, it must be at least a page of 16 tokens"
    )
