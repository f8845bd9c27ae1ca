import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.pipeline.ledger import (
    KV,
    OTHER,
    PARAMS,
    PROGRAM,
    Ledger,
    differences,
    is_contracted,
    slot_pool,
)

POOLS = [PARAMS, KV, PROGRAM, OTHER, slot_pool("a"), slot_pool("b")]
CONTRACTED = [PARAMS, KV, slot_pool("a"), slot_pool("b")]


@st.composite
def ledgers(draw, devices):
    sizes = st.tuples(*[st.integers(0, 2**40)] * devices)
    pools = draw(st.dictionaries(st.sampled_from(POOLS), sizes))
    ledger = Ledger(devices)
    for pool, held in pools.items():
        ledger = ledger.with_pool(pool, held)
    return ledger


pairs = st.integers(1, 4).flatmap(lambda devices: st.tuples(ledgers(devices), ledgers(devices)))


def test_a_pool_that_is_not_held_has_no_bytes_on_any_device():
    assert Ledger(3).of(KV) == (0, 0, 0)
    assert Ledger(3).sum_of(KV) == 0
    assert Ledger(3).totals() == {}
    assert Ledger(3).per_device == (0, 0, 0)


def test_totals_and_devices_add_up_over_the_pools():
    ledger = Ledger(2, {PARAMS: (5, 7), KV: (10, 20)})
    assert ledger.totals() == {PARAMS: 12, KV: 30}
    assert ledger.per_device == (15, 27)
    assert ledger.total_bytes == 42


def test_a_pool_is_replaced_not_added_to():
    ledger = Ledger(2, {KV: (1, 2)}).with_pool(KV, (3, 4))
    assert ledger == Ledger(2, {KV: (3, 4)})


def test_a_pool_of_no_bytes_is_left_out():
    assert Ledger(2, {KV: (1, 2), PARAMS: (1, 1)}).with_pool(KV, (0, 0)) == Ledger(
        2, {PARAMS: (1, 1)}
    )


def test_with_pool_leaves_the_ledger_it_came_from_as_it_was():
    before = Ledger(1, {KV: (1,)})
    before.with_pool(KV, (2,))
    assert before == Ledger(1, {KV: (1,)})


def test_a_pool_for_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="pool 'kv' has 3 devices, not 2"):
        Ledger(2).with_pool(KV, (1, 2, 3))


def test_params_kv_and_slots_are_held_to_the_byte_and_the_rest_is_not():
    assert [pool for pool in POOLS if is_contracted(pool)] == CONTRACTED


def test_a_difference_is_measured_minus_planned_for_every_contracted_pool():
    planned = Ledger(2, {PARAMS: (5, 5), KV: (8, 8), OTHER: (1, 1)})
    measured = Ledger(2, {PARAMS: (5, 5), slot_pool("a"): (2, 2), OTHER: (9, 9)})
    assert differences(planned, measured) == {PARAMS: 0, KV: -16, slot_pool("a"): 4}


def test_a_split_over_the_devices_that_differs_cannot_pass_by_its_sum():
    planned = Ledger(3, {KV: (4, 4, 4)})
    assert differences(planned, Ledger(3, {KV: (5, 6, 1)})) == {KV: -3}


@given(pairs)
def test_differences_are_all_zero_exactly_if_the_contracted_pools_are_equal(pair):
    planned, measured = pair
    equal = all(planned.of(pool) == measured.of(pool) for pool in CONTRACTED)
    assert equal == (not any(differences(planned, measured).values()))


@given(pairs)
def test_the_total_is_the_same_by_pool_and_by_device(pair):
    for ledger in pair:
        assert ledger.total_bytes == sum(ledger.per_device) == sum(ledger.totals().values())
        assert all(any(sizes) for sizes in ledger.pools.values())
