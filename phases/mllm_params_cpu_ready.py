"""Load the checkpoint as an MLLM-JAX parameter tree on the host."""

from pathlib import Path
from typing import override

from kvpipe.checkpoints import HOST_DTYPES
from kvpipe.config.schema import checked, one_of
from kvpipe.errors import InputError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import host
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase


class MllmParamsCpuReady(WorkerPhase):
    """Load the tree; its leaves are views of the mapped files, or arrays that orbax read.

    Attributes:
        name: name of the tree for later steps.
        dtype: cast to this dtype, e.g. ``float32``, while loading; None keeps the checkpoint's.
        orbax: directory of a tree that orbax has saved, instead of the model's own files.
    """

    name: str = "mllm"
    dtype: str | None = checked(None, one_of(*HOST_DTYPES))
    orbax: str | None = None

    def __post_init__(self) -> None:
        if self.orbax is not None and not Path(self.orbax).expanduser().is_dir():
            raise InputError(f"orbax is {self.orbax!r}, which is not a directory")

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        tree = (host(self.name),)
        return Effect(forbids=tree, adds=tree, reads_weights=self.orbax is None)

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.checkpoints import mllm, orbax_tree

        if self.orbax is None:
            weights = ctx.hf_weights(None)
        else:
            weights = mllm.hf_weights(orbax_tree.read_tree(Path(self.orbax).expanduser()))
        tree = ctx.host[self.name] = mllm.tree_from_checkpoint(weights, self.dtype)
        sizes = [leaf.nbytes for _, leaf in mllm.leaves(tree)]
        return Result({"num_params": len(sizes), "params_bytes": sum(sizes)})
