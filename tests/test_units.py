import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.units import gib, sized, unit_for


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.000 KiB"),
        (21_529_916, "20.53 MiB"),
        (9_663_750_144, "9.000 GiB"),
        (-6_294_528, "-6.003 MiB"),
        (2 * 1024**4, "2.000 TiB"),
    ],
)
def test_a_size_is_written_in_the_unit_of_its_magnitude(size, text):
    assert sized(size) == text


@given(st.integers(1, 1 << 60))
def test_a_unit_is_the_largest_of_which_there_is_one(size):
    unit = unit_for(size)
    assert size >= unit.size
    assert size < 1024 * unit.size or unit.name == "TiB"


def test_gib_keeps_five_characters():
    assert [gib(n * 1024**3) for n in (1, 10, 100, 1000)] == ["1.000", "10.00", "100.0", "1000"]
