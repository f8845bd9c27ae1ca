"""Build a parameter set for the engine on the devices, beside the one it computes with."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import InputError
from kvpipe.phase import TRAINER_SETS, Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class ParamDict(WorkerPhase):
    """Build the set from a host tree into a slot.

    Attributes:
        slot: name of the slot that holds the set.
        source: name of the host tree.
    """

    slot: str
    source: str = "mllm"

    def __post_init__(self) -> None:
        if self.slot in TRAINER_SETS:
            raise InputError(
                f"slot is {self.slot!r}, as one of the trainer's own sets is called; "
                "choose another name"
            )

    def effect(self, before: frozenset[str]) -> Effect:
        """Fill the slot with a second set of parameters."""
        slot = facts.slot(self.slot)
        return Effect(
            needs=(facts.ENGINE, facts.host(self.source)),
            forbids=(slot,),
            leaves=(slot,),
            pools={ledger.slot_pool(self.slot): Size.PARAMS},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Build it.

        Raises:
            EngineError: a weight is missing or has another shape than the engine's.
        """
        from kvpipe.checkpoints.mllm import HfView
        from kvpipe.engine import memory, weights

        built = weights.build(ctx.engine, HfView(ctx.host[self.source]))
        ctx.slots[self.slot] = built
        size = sum(memory.bytes_of(built.values()))
        expected = sum(memory.bytes_of(weights.parameters(ctx.engine).values()))
        return Result(
            {"num_params": len(built), "param_bytes": size},
            (check_equal("param_dict_bytes_equal_params", expected, size),),
        )
