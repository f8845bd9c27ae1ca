import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.units import brief, counted, sized, unit_for


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


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1.00K"),
        (21_529_916, "20.5M"),
        (10_480_000, "9.99M"),
        (10_483_000, "10.0M"),
        (1023 << 20, "1023M"),
        (9_663_750_144, "9.00G"),
        (50 << 40, "50.0T"),
    ],
)
def test_a_size_for_a_column_has_five_characters_at_most(size, text):
    assert brief(size) == text
    assert len(text) <= 5


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 phases"), (1, "1 phase"), (1024, "1,024 phases")]
)
def test_one_thing_is_not_counted_in_the_plural(count, text):
    assert counted(count, "phase") == text
