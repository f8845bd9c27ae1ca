"""Build a parameter set for the engine on the devices, beside the one it computes with."""

from typing import override

from kvpipe.errors import InputError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE, host, slot
from kvpipe.pipeline.ledger import TRAINER_SETS
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.records.run import check_equal


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
            why = "the name of one of the trainer's own sets; choose another name"
            raise InputError(f"slot is {self.slot!r}, {why}")

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        made = (slot(self.slot),)
        return Effect(needs=(ENGINE, host(self.source)), forbids=made, adds=made)

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import memory, weights

        built = weights.build(ctx.engine, ctx.hf_weights(self.source))
        ctx.slots[self.slot] = built
        size = sum(memory.bytes_of(built.values()))
        expected = sum(memory.bytes_of(weights.parameters(ctx.engine).values()))
        check = check_equal("param_dict_bytes_equal_params", expected, size)
        return Result({"num_params": len(built), "param_bytes": size}, (check,))
