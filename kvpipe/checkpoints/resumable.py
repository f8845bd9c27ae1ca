"""The checkpoint that a run can be resumed from: what is in it, and its way to the disk and back.

Orbax writes it, arrays and description in one directory, which has its name only once it is whole;
a run that is killed while it writes leaves the earlier checkpoint. Orbax imports jax, so only the worker may
call :func:`write` and :func:`read_arrays`; the description is JSON, which the parent reads.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpipe.checkpoints.json_object import read_object
from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.records.json_record import decode
from kvpipe.units import counted

FORMAT = 1
"""Version of the format; one is not read by kvpipe of another."""
CHECKPOINTS_DIR = "checkpoints"
"""Name of the directory in a run directory."""
Arrays = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Set, number of the array in it, number of the shard → the shard as a numpy array."""
_STATE, _ABOUT = "state", "about"
_COMMITTED = ("_CHECKPOINT_METADATA", f"{_STATE}/_METADATA", f"{_STATE}/manifest.ocdbt")
_NAME = re.compile(r"cycle-(\d+)(.*orbax-checkpoint-tmp.*)?")


@dataclass(frozen=True)
class About:
    """Description of a checkpoint.

    Attributes:
        format: version of its format.
        cycle: the cycle that it was made after.
        steps: training steps so far; the position in the data and the seeds follow from it.
        losses: loss of each of them, if there is one.
        outputs: the outputs that later steps may compare with, by step name.
        config: the config of the run, as plain values.
        files: SHA-256 of each file that the config names and the training reads, by key.
        versions: the installed versions.
        tracking_id: id of the W&B run; None without one.
        devices: number of devices.
        arrays: set → name, shape, dtype and shards of each array.
        nbytes: bytes of all arrays.
    """

    format: int
    cycle: int
    steps: int
    losses: Sequence[float]
    outputs: Mapping[str, Any]
    config: Mapping[str, Any]
    files: Mapping[str, str | None]
    versions: Mapping[str, str]
    tracking_id: str | None
    devices: int
    arrays: Mapping[str, Any]
    nbytes: int


def path_of(directory: Path, cycle: int) -> Path:
    """Return the path of the checkpoint of a cycle."""
    return directory / f"cycle-{cycle}"


def last(directory: Path) -> Path | None:
    """Return the checkpoint of the latest cycle in a directory; None if there is none."""
    found = {int(match[1]): path for path, match in _named(directory)}
    return found[max(found)] if found else None


def read(path: Path) -> About:
    """Return the description of a checkpoint.

    Raises:
        InputError: it is not whole, or of another version of the format.
    """
    if missing := [name for name in _COMMITTED if not (path / name).is_file()]:
        raise InputError(_not_whole(path, f"it has no {missing[0]}"))
    try:
        found = read_object(path / _ABOUT / "metadata")
    except InputError as error:
        raise InputError(_not_whole(path, str(error))) from None
    if (version := found.get("format")) != FORMAT:
        raise InputError(
            f"resume: {path} has format {version!r}, and this kvpipe reads {FORMAT}; resume with the "
            "version of kvpipe that wrote it"
        )
    try:
        about: About = decode(About, found)
    except TypeError as error:
        raise InputError(_not_whole(path, str(error))) from None
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if there < about.nbytes:
        raise InputError(
            _not_whole(path, f"it has {there:,} bytes, and its arrays alone {about.nbytes:,}")
        )
    return about


def check_devices(config: Kvpipe, devices: int) -> None:
    """Refuse another number of devices than that of the checkpoint that a run resumes.

    Raises:
        InputError: with both numbers.
    """
    if config.resume_after is None or config.trainer.checkpoint_dir is None:
        return
    path = path_of(Path(config.trainer.checkpoint_dir), config.resume_after)
    if (saved := read(path).devices) != devices:
        raise InputError(
            f"resume: {path} was made on {counted(saved, 'device')}, and there are {devices} here"
        )


def write(directory: Path, about: About, arrays: Arrays) -> Path:
    """Write a checkpoint, remove those before it and return its path.

    Raises:
        OSError: it cannot be written.
    """
    from orbax import checkpoint

    path = path_of(directory, about.cycle)
    handler = checkpoint.CompositeCheckpointHandler(
        # Stored as they are, the sizes of the files show what is missing.
        **{
            _STATE: checkpoint.PyTreeCheckpointHandler(use_compression=False),
            _ABOUT: checkpoint.JsonCheckpointHandler(),
        }
    )
    parts = {
        _STATE: checkpoint.args.PyTreeSave(arrays),
        _ABOUT: checkpoint.args.JsonSave(json.loads(json.dumps(asdict(about)))),
    }
    remove(directory, unfinished=True)
    with checkpoint.Checkpointer(handler) as writer:
        writer.save(path.absolute(), checkpoint.args.Composite(**parts))
    remove(directory, but=path)
    return path


def read_arrays(path: Path, shards: Mapping[str, Sequence[int]]) -> Arrays:
    """Return the arrays of a checkpoint, given how many shards each array of a set has.

    Raises:
        InputError: they cannot be read.
    """
    import numpy as np
    from orbax import checkpoint

    as_numpy = checkpoint.RestoreArgs(restore_type=np.ndarray)
    wanted = {
        size: {str(i): {str(j): as_numpy for j in range(count)} for i, count in enumerate(counts)}
        for size, counts in shards.items()
    }
    with checkpoint.PyTreeCheckpointer() as reader:
        try:
            return reader.restore(path.absolute() / _STATE, restore_args=wanted)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(_not_whole(path, f"{type(error).__name__}: {error}")) from error


def remove(directory: Path, but: Path | None = None, unfinished: bool = False) -> None:
    """Remove a directory's checkpoints except one, or only the incomplete ones of a killed run."""
    for path, _ in _named(directory, unfinished):
        if path != but:
            shutil.rmtree(path)


def _named(directory: Path, unfinished: bool = False) -> list[tuple[Path, re.Match[str]]]:
    """Return what is called as a checkpoint, or as one that orbax has not finished."""
    found = directory.iterdir() if directory.is_dir() else ()
    matches = [(path, _NAME.fullmatch(path.name)) for path in found]
    return [(path, match) for path, match in matches if match and bool(match[2]) == unfinished]


def _not_whole(path: Path, why: str) -> str:
    return f"resume: the checkpoint {path} is not whole: {why}"
