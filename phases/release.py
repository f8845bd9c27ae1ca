"""Let go of parameter sets on the devices and of parameter trees on the host."""

from dataclasses import dataclass
from typing import ClassVar

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Kind, Result, Size, WorkerPhase


@dataclass(frozen=True)
class Release(WorkerPhase):
    """Release slots and host trees, and give freed pages back to the system.

    Attributes:
        slots: names of the slots to release. Arrays that the engine computes with stay alive in the engine.
        host: names of the host trees to release.
    """

    slots: tuple[str, ...] = ()
    host: tuple[str, ...] = ()

    kind: ClassVar[Kind] = Kind.CLEANS

    def effect(self, before: frozenset[str]) -> Effect:
        """Empty the slots and take the host trees away."""
        held = (*map(facts.slot, self.slots), *map(facts.host, self.host))
        return Effect(
            needs=held,
            takes=(*held, *map(facts.shared, self.slots)),
            pools={ledger.slot_pool(slot): Size.NOTHING for slot in self.slots},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Release those that are there: all, but after a failure of an earlier step."""
        from kvpipe.engine import memory, weights

        engine = ctx.started
        params = weights.parameters(engine).values() if engine else ()
        in_use = {id(array) for array in params}
        slots = tuple(name for name in self.slots if name in ctx.slots)
        host = tuple(name for name in self.host if name in ctx.host)
        freed = 0
        for name in slots:
            arrays = ctx.slots.pop(name).values()
            own = [array for array in arrays if id(array) not in in_use]
            freed += sum(memory.bytes_of(own))
            for array in own:
                array.delete()
        for name in host:
            del ctx.host[name]
        memory.give_back_host_memory()
        return Result({"released_slots": slots, "released_host": host, "freed_bytes": freed})
