"""Import jax and find the devices, before the engine is started on them."""

from dataclasses import dataclass

from kvpipe import facts
from kvpipe.context import WorkerContext
from kvpipe.phase import Effect, Result, WorkerPhase


@dataclass(frozen=True)
class JaxReady(WorkerPhase):
    """Find the devices and refuse a mesh that does not take all of them."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the devices."""
        return Effect(leaves=(facts.JAX,))

    def run(self, ctx: WorkerContext) -> Result:
        """Find them.

        Raises:
            InputError: tp × dp is not the device count, or the platform is another.
        """
        from kvpipe.engine import devices

        devices.check_devices(ctx.config.engine)
        ctx.jax_ready = True
        return Result(devices.describe())
