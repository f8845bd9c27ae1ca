"""Release parameter sets on the devices and parameter trees on the host."""

from typing import override

from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.phase import Effect, OnFailure, Result, WorkerPhase


class Release(WorkerPhase):
    """Release slots and host trees, and give freed pages back to the system.

    Attributes:
        slots: names of the slots to release. Arrays that the engine computes with stay alive in the engine.
        host: names of the host trees to release.
    """

    slots: tuple[str, ...] = ()
    host: tuple[str, ...] = ()

    on_failure = OnFailure.ALWAYS_RUN

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        held = (*map(facts.slot, self.slots), *map(facts.host, self.host))
        return Effect(needs=held, removes=(*held, *map(facts.shared, self.slots)))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import weights

        # After a failure of an earlier step some may be missing.
        slots = tuple(name for name in self.slots if name in ctx.slots)
        host = tuple(name for name in self.host if name in ctx.host)
        for name in host:
            del ctx.host[name]
        freed = weights.release(ctx.started, [ctx.slots.pop(name) for name in slots])
        return Result({"released_slots": slots, "released_host": host, "freed_bytes": freed})
