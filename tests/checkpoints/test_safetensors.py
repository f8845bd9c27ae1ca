import json
import math
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvpipe.checkpoints.safetensors import INDEX_NAME, open_checkpoint, write
from kvpipe.errors import InputError

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
dtypes = st.sampled_from(
    [np.float32, np.float16, np.float64, np.int32, np.int64, np.uint8, np.bool_, np.int8]
)
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_side=4)))
tensor_dicts = st.dictionaries(names, arrays, max_size=4)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def save_shards(directory, weight_map, shards):
    for file, tensors in shards.items():
        write(directory / file, tensors)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_refused(directory, *words):
    with pytest.raises(InputError) as error:
        open_checkpoint(directory)
    for word in words:
        assert word in str(error.value)


@given(tensors=tensor_dicts)
def test_tensors_written_by_the_safetensors_library_are_read_back_bit_identically(tensors):
    with tempfile.TemporaryDirectory() as directory:
        safetensors.numpy.save_file(tensors, Path(directory) / "model.safetensors")
        checkpoint = open_checkpoint(Path(directory))
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            assert_same_bits(checkpoint[name], tensor)


@given(tensors=tensor_dicts)
def test_tensors_written_here_are_read_bit_identically_by_the_safetensors_library(tensors):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        write(path, tensors)
        loaded = safetensors.numpy.load_file(path)
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert_same_bits(loaded[name], tensor)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_dtypes_that_numpy_lacks_keep_every_bit(tmp_path, dtype):
    size = 256 ** np.dtype(dtype).itemsize
    every = np.arange(size, dtype=f"u{np.dtype(dtype).itemsize}").view(dtype)
    write(tmp_path / "model.safetensors", {"every": every})
    assert_same_bits(open_checkpoint(tmp_path)["every"], every)


@given(content=st.binary(max_size=64))
def test_random_bytes_for_a_file_are_refused_with_an_input_error(content):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError):
            open_checkpoint(Path(directory))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
sizes = st.integers(-1, 3) | st.just(2**70)
headers = json_values | st.dictionaries(
    st.text(max_size=2),
    json_values
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I4"]),
            "shape": st.lists(sizes, max_size=70),
            "data_offsets": st.lists(sizes, max_size=3),
        }
    ),
)


@given(header=headers, data=st.binary(max_size=16))
def test_a_corrupt_header_raises_nothing_but_input_errors(header, data):
    with tempfile.TemporaryDirectory() as directory:
        raw_file(Path(directory) / "model.safetensors", header, data)
        try:
            checkpoint = open_checkpoint(Path(directory))
        except InputError:
            return
        assert sum(tensor.nbytes for tensor in checkpoint.values()) == len(data)


def test_a_header_nested_too_deeply_is_refused(tmp_path):
    raw_file(tmp_path / "model.safetensors", b"[" * 200_000)
    assert_refused(tmp_path, "model.safetensors", "invalid JSON in header")


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    write(path, {"a": np.zeros(8, np.float32), "b": np.ones((3, 3), np.float32)})
    path.write_bytes(path.read_bytes()[:-cut])
    assert_refused(tmp_path, str(path), "truncated")


def test_arrays_are_read_only_views_into_one_map(tmp_path):
    write(tmp_path / "model.safetensors", {"a": np.arange(4.0), "b": np.arange(3, dtype="i4")})
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint["a"].flags.writeable
    assert np.shares_memory(checkpoint["a"], checkpoint["a"])
    assert not checkpoint["a"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        checkpoint["a"][0] = 1


def test_a_checkpoint_has_the_tensors_of_all_files_in_the_order_of_the_files_names(tmp_path):
    write(tmp_path / "b.safetensors", {"b": np.zeros((2, 3), np.float32)})
    write(tmp_path / "a.safetensors", {"a": np.zeros(5, ml_dtypes.bfloat16)})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["a", "b"]
    assert [tensor.nbytes for tensor in checkpoint.values()] == [10, 24]


def test_an_index_chooses_the_files(tmp_path):
    save_shards(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": {"a": np.arange(3)}})
    write(tmp_path / "stray.safetensors", {"a": np.zeros(9)})
    assert_same_bits(open_checkpoint(tmp_path)["a"], np.arange(3))


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    save_shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": {}})
    assert_refused(tmp_path, INDEX_NAME, "not there: 2.safetensors")


def test_an_index_whose_tensor_is_in_no_file_is_refused(tmp_path):
    save_shards(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": {"b": np.zeros(1)}})
    assert_refused(tmp_path, "'a' should be in 1.safetensors, but no file has it")


def test_an_index_whose_tensor_is_in_another_file_is_refused(tmp_path):
    shards = {"1.safetensors": {"a": np.zeros(1)}, "2.safetensors": {"b": np.zeros(1)}}
    save_shards(tmp_path, {"a": "2.safetensors", "b": "1.safetensors"}, shards)
    assert_refused(tmp_path, "'a' should be in 2.safetensors, but it is in 1.safetensors")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    save_shards(tmp_path, weight_map, {})
    assert_refused(tmp_path, INDEX_NAME, "'weight_map' should map", repr(weight_map))


@pytest.mark.parametrize("file", [3, "", "../up.safetensors", "/etc/passwd"])
def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path, file):
    save_shards(tmp_path, {"a": file}, {})
    assert_refused(tmp_path, INDEX_NAME, repr(file))


def test_an_index_that_is_no_json_is_refused(tmp_path):
    (tmp_path / INDEX_NAME).write_bytes(b"\xff{")
    assert_refused(tmp_path, INDEX_NAME, "not valid JSON")


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere is not a directory")


def test_a_directory_without_safetensors_is_refused(tmp_path):
    assert_refused(tmp_path, "holds no *.safetensors file")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        write(tmp_path / name, {"a": np.zeros(1)})
    assert_refused(tmp_path, "'a'", "two files", "one.safetensors", "two.safetensors")


def test_a_tensor_twice_in_one_header_is_refused(tmp_path):
    twice = b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
    raw_file(tmp_path / "model.safetensors", twice, bytes(8))
    assert_refused(tmp_path, "more than once: a")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([1], "invalid type: sequence"),
        ({"a": 1}, "invalid type: integer `1`"),
        ({"a": entry("F31")}, "unknown variant `F31`, expected one of `BOOL`"),
        ({"a": entry(["F32"])}, "invalid type: sequence, expected string"),
        ({"a": entry(shape=(-2,))}, "invalid value: integer `-2`"),
        ({"a": entry(shape=(True, 2))}, "invalid type: boolean `true`"),
        ({"a": entry(offsets=(0, 8.0))}, "invalid type: floating point `8.0`"),
        ({"a": entry(offsets=(8, 0))}, "invalid offset for tensor `a`"),
        ({"a": entry(offsets=(8,))}, "expected a tuple of size 2"),
        ({"a": entry(shape=(3,))}, "invalid shape, data type, or offset for tensor"),
        ({"a": entry(), "b": entry()}, "invalid offset for tensor"),
        ({"a": entry(offsets=(4, 12))}, "invalid offset for tensor `a`"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "file not fully covered"),
        ({"a": entry(shape=(2**70, 0), offsets=(0, 0)), "b": entry()}, "expected usize"),
        ({"a": entry(shape=(2**62, 0), offsets=(0, 0)), "b": entry()}, "cannot have shape"),
        ({"a": entry(shape=(1,) * 65 + (2,))}, "cannot have shape"),
        ({"a": entry("F4", shape=(16,))}, "tensor 'a' has the unknown dtype 'F4'; did you mean"),
    ],
)
def test_a_wrong_header_is_refused_by_what_is_wrong_in_it(tmp_path, header, words):
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    assert_refused(tmp_path, "model.safetensors", words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"1234567", "header too small"),
        ((99).to_bytes(8, "little") + b"{}", "invalid header length"),
        ((2).to_bytes(8, "little") + b"{{", "invalid JSON in header"),
    ],
)
def test_a_file_without_a_header_is_refused(tmp_path, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path, "model.safetensors", words)


def test_a_dtype_that_safetensors_lacks_is_not_written(tmp_path):
    with pytest.raises(InputError, match="'a' has dtype complex64"):
        write(tmp_path / "model.safetensors", {"a": np.zeros(1, np.complex64)})


def test_data_begins_aligned(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"odd name": np.zeros(1, np.float64)})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert math.gcd(length, 8) == 8
