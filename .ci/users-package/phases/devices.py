"""Check that the engine has the devices that the config asks for: ``devices_are_the_engines``."""

from typing import override

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import ENGINE
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.records.run import check_equal


class AcmeDevices(WorkerPhase):
    """Count the devices."""

    effect = Effect(needs=(ENGINE,))

    @override
    def run(self, ctx: WorkerContext) -> Result:
        import jax

        check = check_equal(
            "devices_are_the_engines", ctx.config.engine.tp_size, jax.device_count()
        )
        return Result({}, (check,))
