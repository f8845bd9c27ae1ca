"""Check that the engine computes with the very arrays of a slot: all of them, not a sample."""

from dataclasses import dataclass
from typing import ClassVar

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Kind, Result, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class ParamSharingCheck(WorkerPhase):
    """Compare the engine's parameters with the slot's by identity.

    Attributes:
        slot: name of the slot that was swapped in.
    """

    slot: str = "param_dict"

    kind: ClassVar[Kind] = Kind.MEASURES

    def effect(self, before: frozenset[str]) -> Effect:
        """Need the slot to be the engine's; change nothing."""
        return Effect(needs=(facts.slot(self.slot), facts.shared(self.slot)))

    def run(self, ctx: WorkerContext) -> Result:
        """Compare."""
        from kvpipe.engine import weights

        held = ctx.slots[self.slot]
        current = weights.parameters(ctx.engine)
        shared = sorted(path for path, array in current.items() if held.get(path) is array)
        apart = sorted(current.keys() - set(shared))
        return Result(
            {"num_params": len(current), "results": {"shared": len(shared), "apart": apart}},
            (
                check_equal(
                    "params_are_shared",
                    len(current),
                    len(shared),
                    f"not the engine's arrays: {apart}" if apart else "",
                ),
            ),
        )
