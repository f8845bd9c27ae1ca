"""Read and write safetensors files without copying tensors and without trusting headers.

The engine receives one leaf at a time, so a checkpoint must cost address space, not memory: each
file is mapped once and every tensor is a read-only view into the map. The header is checked in full
when the checkpoint is opened, because a wrong offset would otherwise become wrong text instead of
an error. This module handles bytes, shapes and dtypes, never the meaning of a tensor.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvpipe.checkpoints.mapped import map_bytes
from kvpipe.errors import InputError
from kvpipe.suggest import nearest

INDEX_NAME = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Checkpoint(Mapping[str, NDArray[Any]]):
    """Every tensor of a Hugging Face directory by name, memory-mapped and read-only.

    The arrays have the shape and dtype of the file (`[out, in]` for a linear layer's weight;
    bfloat16 is `ml_dtypes.bfloat16`). An array keeps its file mapped for as long as it lives.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Wrap tensors that are already mapped; use `open` to map a directory."""
        self._directory = directory
        self._tensors = dict(tensors)

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Map all safetensors files of `directory`.

        The files are those that `model.safetensors.index.json` names, or, without an index,
        all `*.safetensors`. No tensor data is read.

        Raises:
            InputError: the directory, an index entry or a file is missing, or a header is wrong.
        """
        if not directory.is_dir():
            raise InputError(f"checkpoint {directory} is not a directory")
        index_path = directory / INDEX_NAME
        weight_map = _read_index(index_path) if index_path.is_file() else {}
        paths = _indexed_files(index_path, weight_map) if weight_map else _all_files(directory)
        tensors, homes = _map_files(paths)
        for name, file in weight_map.items():
            if homes.get(name) != file:
                actual = f"it is in {homes[name]}" if name in homes else "no file has it"
                raise InputError(f"{index_path}: tensor {name!r} should be in {file}, but {actual}")
        return cls(directory, tensors)

    @property
    def directory(self) -> Path:
        """The opened directory."""
        return self._directory

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, without headers."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write tensors to one safetensors file; equal tensors in equal order give equal bytes.

    Raises:
        InputError: a tensor has a dtype that safetensors does not support.
    """
    header: dict[str, Any] = {_METADATA_KEY: {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise InputError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; "
                f"valid are: {', '.join(str(known) for known in _DTYPE_NAMES)}"
            )
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # align the data, as the format advises
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


@dataclass(frozen=True)
class _Entry:
    """One tensor of a header; `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_index(path: Path) -> dict[str, str]:
    """Return the index's map from tensor name to file name."""
    index = _parse_json(path.read_bytes(), where=str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{path}: 'weight_map' should map tensor names to files, got {weight_map!r}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise InputError(
                f"{path}: tensor {name!r} is said to be in {file!r}, "
                "which is not the plain name of a file beside the index"
            )
    return weight_map


def _indexed_files(index_path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    directory = index_path.parent
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{index_path} names files that are not there: {', '.join(missing)}")
    return [directory / name for name in names]


def _all_files(directory: Path) -> list[Path]:
    paths = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if not paths:
        raise InputError(f"checkpoint {directory} holds no *.safetensors file")
    return paths


def _map_files(paths: list[Path]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return all files' tensors by name, and the file name of each tensor."""
    tensors: dict[str, NDArray[Any]] = {}
    homes: dict[str, str] = {}
    for path in paths:
        for name, tensor in _map_file(path).items():
            if name in homes:
                raise InputError(
                    f"tensor {name!r} is in two files of {path.parent}: "
                    f"{homes[name]} and {path.name}; it may be in one"
                )
            tensors[name] = tensor
            homes[name] = path.name
    return tensors, homes


def _map_file(path: Path) -> dict[str, NDArray[Any]]:
    size = path.stat().st_size
    if size < _LENGTH_BYTES:
        raise InputError(f"{path} is truncated: {size} bytes, the header's length alone takes 8")
    mapped = map_bytes(path)
    length = int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), "little")
    if length > size - _LENGTH_BYTES:
        raise InputError(
            f"{path} is truncated or no safetensors file: "
            f"the header should take {length} bytes, the file has {size - _LENGTH_BYTES} for it"
        )
    data_start = _LENGTH_BYTES + length
    header = _parse_json(mapped[_LENGTH_BYTES:data_start].tobytes(), where=f"{path}, header")
    entries = [
        _parse_entry(path, name, value) for name, value in header.items() if name != _METADATA_KEY
    ]
    data = mapped[data_start:]
    _check_layout(path, entries, data.nbytes)
    return {entry.name: _view(path, entry, data) for entry in entries}


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{where} should be a JSON object, got a {type(parsed).__name__}")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it has these keys more than once: {', '.join(twice)}")
    return parsed


def _parse_entry(path: Path, name: str, value: object) -> _Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict):
        raise InputError(f"{where} should be described by a JSON object, got {value!r}")
    dtype_name = value.get("dtype")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise InputError(
            f"{where} has the unknown dtype {dtype_name!r}; {nearest(str(dtype_name), _DTYPES)}"
        )
    shape = _naturals(value.get("shape"), f"{where}: 'shape'")
    offsets = _naturals(value.get("data_offsets"), f"{where}: 'data_offsets'")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: 'data_offsets' should be [begin, end], got {list(offsets)}")
    dtype = _DTYPES[dtype_name]
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise InputError(
            f"{where}: {dtype_name} of shape {list(shape)} takes {needed} bytes, "
            f"'data_offsets' {list(offsets)} give it {offsets[1] - offsets[0]}"
        )
    return _Entry(name, dtype, shape, offsets[0], offsets[1])


def _naturals(value: object, where: str) -> tuple[int, ...]:
    # type() rather than isinstance(), because JSON's true would count as 1.
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise InputError(f"{where} should be a list of whole numbers from 0 up, got {value!r}")
    return tuple(value)


def _check_layout(path: Path, entries: list[_Entry], data_bytes: int) -> None:
    """Refuse tensors that overlap, leave gaps or do not fill the file."""
    expected = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != expected:
            raise InputError(
                f"{path}: tensor {entry.name!r} begins at byte {entry.begin} of the data, "
                f"the one before it ends at {expected}"
            )
        expected = entry.end
    if expected != data_bytes:
        raise InputError(
            f"{path} is truncated or has bytes to spare: "
            f"its tensors take {expected} bytes, it holds {data_bytes}"
        )


def _view(path: Path, entry: _Entry, data: NDArray[Any]) -> NDArray[Any]:
    try:
        return data[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)
    except (ValueError, OverflowError) as error:  # more or longer dimensions than numpy supports
        raise InputError(
            f"{path}: tensor {entry.name!r} cannot have shape {list(entry.shape)}: {error}"
        ) from error
