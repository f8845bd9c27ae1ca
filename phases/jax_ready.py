"""Import jax and find the devices, before the engine is started on them."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import JAX
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase


class JaxReady(WorkerPhase):
    """Find the devices and refuse a mesh that does not use all of them."""

    effect = Effect(adds=(JAX,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import devices

        devices.check_devices(ctx.config.engine)
        ctx.jax_ready = True
        return Result(devices.describe())
