"""Load the checkpoint as an MLLM-JAX parameter tree on the host."""

from dataclasses import dataclass

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, WorkerPhase


@dataclass(frozen=True)
class MllmParamsCpuReady(WorkerPhase):
    """Load the tree; its leaves are views of the mapped files.

    Attributes:
        name: what later steps call the tree.
        dtype: cast to this dtype while loading; None keeps the checkpoint's.
    """

    name: str = "mllm"
    dtype: str | None = None

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
        from kvpipe.checkpoints.safetensors import Checkpoint

        tree = mllm.tree_from_checkpoint(Checkpoint.open(ctx.model_dir), self.dtype)
        ctx.host[self.name] = tree
        return Result({"num_params": mllm.num_leaves(tree), "params_bytes": mllm.nbytes(tree)})
