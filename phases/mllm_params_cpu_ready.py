"""Load the checkpoint as an MLLM-JAX parameter tree on the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpipe import facts
from kvpipe.checkpoints import HOST_DTYPES
from kvpipe.context import WorkerContext
from kvpipe.errors import InputError
from kvpipe.phase import Effect, Result, WorkerPhase
from kvpipe.suggest import nearest


@dataclass(frozen=True)
class MllmParamsCpuReady(WorkerPhase):
    """Load the tree; its leaves are views of the mapped files, or what orbax read.

    Attributes:
        name: what later steps call the tree.
        dtype: cast to this dtype, e.g. ``float32``, while loading; None keeps the checkpoint's.
        orbax: directory of a tree that orbax has saved, instead of the model's own files.
    """

    name: str = "mllm"
    dtype: str | None = None
    orbax: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in HOST_DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; {nearest(self.dtype, HOST_DTYPES)}")

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the host tree."""
        tree = facts.host(self.name)
        return Effect(forbids=(tree,), leaves=(tree,))

    def run(self, ctx: WorkerContext) -> Result:
        """Load it.

        Raises:
            InputError: the checkpoint is not there or damaged.
        """
        from kvpipe.checkpoints import mllm

        tree = mllm.tree_from_checkpoint(self._weights(ctx), self.dtype)
        ctx.host[self.name] = tree
        return Result({"num_params": mllm.num_leaves(tree), "params_bytes": mllm.nbytes(tree)})

    def _weights(self, ctx: WorkerContext) -> Mapping[str, Any]:
        from kvpipe.checkpoints.mllm import HfView
        from kvpipe.checkpoints.orbax_tree import read_tree
        from kvpipe.checkpoints.safetensors import Checkpoint

        if self.orbax is None:
            return Checkpoint.open(ctx.model_dir)
        return HfView(read_tree(Path(self.orbax).expanduser()))
