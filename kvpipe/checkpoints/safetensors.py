"""Read and write safetensors files without copying tensors and without trusting headers.

The engine receives one leaf at a time, so a checkpoint must cost address space, not memory: each
file is mapped once and every tensor is a read-only view into the map (the safetensors library's own
arrays are copies). That library checks each header in full when the checkpoint is opened, because a
wrong offset would otherwise become wrong text instead of an error. This module handles bytes, shapes
and dtypes, never the meaning of a tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kvpipe.checkpoints import INDEX_NAME
from kvpipe.checkpoints.json_object import parse_object
from kvpipe.checkpoints.mapped import map_bytes
from kvpipe.errors import InputError
from kvpipe.suggest import nearest

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


Tensors = dict[str, NDArray[Any]]
"""Read-only arrays by tensor name, mapped from their files.

They have the shape and dtype of the file (`[out, in]` for a linear layer's weight; bfloat16 is
`ml_dtypes.bfloat16`). An array keeps its file mapped for as long as it lives.
"""


def open_checkpoint(directory: Path | str) -> Tensors:
    """Map all safetensors files of a Hugging Face directory; return every tensor.

    The files are those that `model.safetensors.index.json` names, or, without an index,
    all `*.safetensors`. No tensor data is read.

    Raises:
        InputError: the directory, an index entry or a file is missing, or a header is wrong.
    """
    directory = Path(directory)
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
    return tensors


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


def _read_index(path: Path) -> dict[str, str]:
    """Return the index's map from tensor name to file name."""
    index = parse_object(path.read_bytes(), where=str(path))
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


def _map_files(paths: list[Path]) -> tuple[Tensors, dict[str, str]]:
    """Return all files' tensors by name, and the file name of each tensor."""
    tensors: Tensors = {}
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


def _map_file(path: Path) -> Tensors:
    _check_header(path)
    mapped = map_bytes(path)
    data_start = _LENGTH_BYTES + int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), "little")
    header = parse_object(mapped[_LENGTH_BYTES:data_start].tobytes(), where=f"{path}, header")
    data = mapped[data_start:]
    return {
        name: _view(f"{path}: tensor {name!r}", entry, data)
        for name, entry in header.items()
        if name != _METADATA_KEY
    }


def _check_header(path: Path) -> None:
    """Refuse a file whose header is damaged, or whose tensors overlap, leave gaps or overrun it."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise InputError(
            f"{path} is damaged, truncated or not a safetensors file: {error}"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _view(where: str, entry: Mapping[str, Any], data: NDArray[Any]) -> NDArray[Any]:
    """Return the tensor that a checked entry of a header describes."""
    name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if name not in _DTYPES:
        raise InputError(f"{where} has the unknown dtype {name!r}; {nearest(name, _DTYPES)}")
    try:
        return data[begin:end].view(_DTYPES[name]).reshape(shape)
    except (ValueError, OverflowError) as error:  # more or longer dimensions than numpy supports
        raise InputError(f"{where} cannot have shape {shape}: {error}") from error
