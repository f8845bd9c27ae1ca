"""Save an offloaded trainer so that a later run can resume it, and read it back.

Each shard is an array of its own in the checkpoint, as it is on the host: no whole array is put
together, so neither way takes more host memory than the offloaded trainer itself.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from kvpipe.checkpoints import resumable
from kvpipe.config import training_inputs
from kvpipe.engine import transfer
from kvpipe.engine.params import Param
from kvpipe.errors import InputError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.ledger import Size
from kvpipe.pipeline.output import Output
from kvpipe.plan.continuation import kept_outputs
from kvpipe.records.json_record import decode
from kvpipe.system.versions import installed_versions
from kvpipe.trainer.layout import Layout
from kvpipe.trainer.state import Trainer

_SAVED_SETS = (Size.TRAINER_PARAMS, Size.TRAINER_MOMENTS)


def save(ctx: WorkerContext, cycle: int) -> dict[str, Any]:
    """Write the checkpoint of a cycle, whose trainer is offloaded; return fields for the record."""
    trainer, config = ctx.trainer, ctx.config
    tree = {
        str(size): {
            str(i): {str(j): shards[index] for j, index in enumerate(_indices(like))}
            for i, (like, shards) in enumerate(zip(trainer.layout.sets[size], leaves, strict=True))
        }
        for size, leaves in trainer.kept.items()
    }
    nbytes = sum(shard.nbytes for shard in jax.tree.leaves(tree))
    outputs = {step: asdict(ctx.outputs[step]) for step in kept_outputs(cycle, [*ctx.outputs])}
    about = resumable.About(
        format=resumable.FORMAT,
        cycle=cycle,
        steps=trainer.steps,
        losses=trainer.losses,
        outputs=outputs,
        config=training_inputs.as_plain(config),
        files=training_inputs.digests(config),
        versions=installed_versions(),
        tracking_id=config.tracking.id,
        devices=trainer.layout.devices,
        arrays=_described(trainer.layout),
        nbytes=nbytes,
    )
    path = resumable.write(_directory(ctx), about, tree)
    return {
        "checkpoint": str(path),
        "cycle": cycle,
        "trained_steps": trainer.steps,
        "checkpoint_bytes": nbytes,
    }


def resume(trainer: Trainer, ctx: WorkerContext) -> Any:
    """Let a new trainer, and the context's outputs, be as the checkpoint of the config has them.

    Raises:
        InputError: its arrays are not the trainer's, or cannot be read.
    """
    cycle = ctx.config.resume_after
    assert cycle is not None
    path = resumable.path_of(_directory(ctx), cycle)
    about = resumable.read(path)
    _check_arrays(path, about.arrays, _described(trainer.layout))
    indices = {size: list(map(_indices, trainer.layout.sets[size])) for size in _SAVED_SETS}
    counts = {str(size): list(map(len, leaves)) for size, leaves in indices.items()}
    tree = resumable.read_arrays(path, counts)
    kept = {
        size: [
            {index: tree[str(size)][str(i)][str(j)] for j, index in enumerate(shards)}
            for i, shards in enumerate(leaves)
        ]
        for size, leaves in indices.items()
    }
    ctx.outputs |= {step: decode(Output, each) for step, each in about.outputs.items()}
    change = trainer.resume(kept, about.steps, about.losses)
    return change.with_fields(checkpoint=str(path), trained_steps=about.steps)


def _directory(ctx: WorkerContext) -> Path:
    directory = ctx.config.trainer.checkpoint_dir
    assert directory is not None, "the command sets it"
    return Path(directory)


def _indices(like: Param) -> list[transfer.Index]:
    """Return the index of each distinct shard of this host's devices."""
    return list(dict.fromkeys(like.sharding.addressable_devices_indices_map(like.shape).values()))


def _described(layout: Layout) -> dict[str, list[list[Any]]]:
    """Return name, shape, dtype and shards of each array that is saved, by set."""
    sets = dict(zip(_SAVED_SETS, (layout.params, layout.moments), strict=True))
    return {
        str(size): [
            [jax.tree_util.keystr(path), list(like.shape), str(like.dtype), str(_indices(like))]
            for path, like in jax.tree_util.tree_leaves_with_path(tree)
        ]
        for size, tree in sets.items()
    }


def _check_arrays(path: Path, saved: Any, here: dict[str, list[list[Any]]]) -> None:
    for size, wanted in here.items():
        found = saved.get(size, [])
        for one, other in zip(found, wanted, strict=False):
            if one != other:
                raise InputError(
                    f"the checkpoint {path} has {one} among its {size}, where this model, its "
                    f"precision and its mesh have {other}"
                )
        if len(found) != len(wanted):
            raise InputError(
                f"the checkpoint {path} has {len(found)} arrays of {size}, and the trainer of this "
                f"model {len(wanted)}"
            )
