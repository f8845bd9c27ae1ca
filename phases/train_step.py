"""Carry out one training step: an optax AdamW update of the whole parameter tree, in place."""

from dataclasses import dataclass, replace
from typing import Self

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.cycles import Cycle
from kvpipe.errors import PhaseError
from kvpipe.phase import TRAIN_STEP, Effect, Result, Size, WorkerPhase, trainer_pools
from kvpipe.records import check_equal


@dataclass(frozen=True)
class TrainStep(WorkerPhase):
    """Train for one step. The engine keeps its weights until they are synced.

    Attributes:
        peak_below: an earlier training step, of the same cycle if both are repeated, that ran with
            the KV cache on the devices. The peak of this one, which has to run without, is lower by
            exactly the cache's bytes.
    """

    peak_below: str | None = None

    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        """Compare with the step of the same cycle."""
        return replace(self, peak_below=self.peak_below and cycle.name(self.peak_below))

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave trained weights that the engine has not got; the sets take what they took."""
        compared = (facts.trained(self.peak_below),) if self.peak_below else ()
        return Effect(
            needs=(facts.ENGINE, facts.TRAINER_LIVE, *compared),
            forbids=(facts.KV_LIVE,) if self.peak_below else (),
            leaves=(facts.TRAINER_AHEAD, facts.trained(self.step)),
            pools={**trainer_pools(live=True), ledger.TRAINER_PROGRAM: Size.TRAINER_PROGRAM},
            runs=(TRAIN_STEP,),
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Train.

        Raises:
            PhaseError: there is no trainer.
        """
        from kvpipe.engine import kv_cache
        from kvpipe.trainer.step import GRADIENTS

        if ctx.trainer is None:
            raise PhaseError("there is no trainer to train")
        report = ctx.trainer.step()
        ctx.step_peaks[self.step] = report.peak_bytes
        fields = {
            "gradients": GRADIENTS,
            "train_step": report.step,
            "compute_s": round(report.compute_s, 6),
            "step_memory": {
                "in_use_bytes": report.in_use_bytes,
                "temp_bytes": report.temp_bytes,
                "peak_bytes": report.peak_bytes,
            },
        }
        checks = (check_equal("step_is_in_place", report.set_bytes, report.in_place_bytes),)
        if self.peak_below is not None:
            lower = ctx.step_peaks[self.peak_below] - report.peak_bytes
            kv_bytes = kv_cache.nbytes(ctx.engine)
            checks = (*checks, check_equal("kv_drop_lowers_peak", kv_bytes, lower))
        return Result(fields, checks)
