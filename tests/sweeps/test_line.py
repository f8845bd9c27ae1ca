from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.sweeps.line import Line, fitted

TOKENS = st.lists(st.integers(1, 1 << 20), min_size=2, max_size=8, unique=True)


@given(TOKENS, st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_the_line_through_exact_bytes_has_their_slope_exactly(tokens, slope, page):
    line = fitted([(n, slope * n + page) for n in tokens])
    assert line == Line(Fraction(slope), Fraction(page))
    assert [line.at(n) for n in tokens] == [slope * n + page for n in tokens]


@given(st.permutations([1, 2, 3, 4]), st.sampled_from([-1, 1]))
def test_one_byte_off_does_not_bend_the_line_and_stands_alone(order, off):
    points = [(n, 100 * n + (off if n == order[0] else 0)) for n in order]
    line = fitted(points)
    assert {n: size - line.at(n) for n, size in points} == {
        n: off if n == order[0] else 0 for n in order
    }


def test_of_three_that_are_on_no_line_one_is_off():
    points = [(1, 10), (2, 20), (3, 31)]
    line = fitted(points)
    assert sorted(size != line.at(n) for n, size in points) == [False, False, True]


@pytest.mark.parametrize("points", [[], [(5, 1)], [(5, 1), (5, 1)], [(5, 1), (5, 2)]])
def test_one_capacity_has_no_line(points):
    assert fitted(points) is None
