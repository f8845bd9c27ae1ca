from hypothesis import given
from hypothesis import strategies as st

from kvpipe.report.tokens import Omitted, Stretch, shortened, stretches

ids = st.lists(st.integers(0, 5), max_size=30)


@given(ids, ids)
def test_the_stretches_are_both_outputs_whole(before, after):
    found = stretches(before, after)
    assert [i for stretch in found for i in stretch.before] == before
    assert [i for stretch in found for i in stretch.after] == after


@given(ids, ids)
def test_what_is_omitted_is_what_is_not_shown(before, after):
    pieces = list(shortened(before, after))
    shown = sum(len(p.before) if isinstance(p, Stretch) else p.count for p in pieces)
    assert shown == len(before)
    assert [p for p in pieces if isinstance(p, Stretch) and not p.same] == [
        s for s in stretches(before, after) if not s.same
    ]


def test_far_from_a_difference_tokens_are_counted_and_not_shown():
    before, after = [*range(100)], [*range(50), -1, *range(51, 100)]
    pieces = list(shortened(before, after))
    assert pieces == [
        Omitted(44),
        Stretch(tuple(range(44, 50)), tuple(range(44, 50))),
        Stretch((50,), (-1,)),
        Stretch(tuple(range(51, 57)), tuple(range(51, 57))),
        Omitted(43),
    ]


def test_long_outputs_that_have_nothing_in_common_are_one_stretch():
    """Matching them would take minutes."""
    before, after = [1, *range(10, 5000), 2], [1, *range(5000, 9990), 2]
    assert [s.same for s in stretches(before, after)] == [True, False, True]
