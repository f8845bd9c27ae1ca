"""The values of a mapped file come in blocks as they are, and the file may not shrink while they are read."""

import os
import re

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.checkpoints.mapped import blocks, let_go, map_bytes
from kvpipe.errors import InputError

BYTES = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "values"
    path.write_bytes(BYTES.tobytes())
    return path


@given(st.integers(0, 999), st.integers(0, 90), st.integers(0, 90), st.integers(1, 9000))
def test_the_blocks_of_a_matrix_are_its_values_whichever_way_it_lies(file, start, rows, columns, n):
    values = BYTES[start : start + 2 * rows * columns].view(np.uint16).reshape(rows, columns)
    mapped = map_bytes(file)[start : start + values.nbytes].view(np.uint16).reshape(rows, columns)
    for array in (mapped, mapped.T, mapped[:, ::2], values, values.T):
        found = [block.copy() for block in blocks(array, n)]
        expected = array.ravel(order="K")
        assert np.array_equal(np.concatenate([*found, expected[:0]]), expected)
        assert all(block.nbytes <= max(n, 2) for block in found)


def test_a_page_that_was_let_go_is_read_again(file):
    mapped = map_bytes(file)
    assert mapped.sum() == BYTES.sum()
    let_go(mapped[5000:])
    assert np.array_equal(mapped, BYTES)


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(BYTES.tobytes())
    mapped = map_bytes(path)
    os.truncate(path, 9000)
    reported = f"{path} ends at byte 9000: it was truncated after it was opened"
    with pytest.raises(InputError, match=f"^{re.escape(reported)}$"):
        list(blocks(mapped, 4096))


def test_a_file_that_took_over_the_path_is_not_the_one_that_is_mapped(tmp_path):
    path, other = tmp_path / "values", tmp_path / "other"
    path.write_bytes(BYTES.tobytes())
    mapped = map_bytes(path)
    other.write_bytes(bytes(BYTES.nbytes))
    other.rename(path)
    assert np.array_equal(np.concatenate([b.copy() for b in blocks(mapped, 4096)]), BYTES)


def test_a_map_that_has_gone_has_closed_its_file(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(BYTES.tobytes())
    before = psutil.Process().num_fds()
    mapped = map_bytes(path)
    assert psutil.Process().num_fds() > before
    del mapped
    assert psutil.Process().num_fds() == before
