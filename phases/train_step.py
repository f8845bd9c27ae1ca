"""Carry out one training step: an optax AdamW update of the whole parameter tree, in place.

With ``trainer.loss=sft`` it learns a batch of ``trainer.data``; with ``grpo`` the samples that were rewarded
last; with ``seeded`` its gradients are random numbers, and it learns nothing.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Self, override

from kvpipe.errors import PhaseError
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, TRAINER_AHEAD, TRAINER_LIVE, trained
from kvpipe.pipeline.ledger import GRADIENTS, TRAIN_STEP, TRAINER_PROGRAM, Size
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase
from kvpipe.records.run import Check, check_equal

if TYPE_CHECKING:
    from kvpipe.trainer.batch import Batch


_PROGRAMS = (GRADIENTS, TRAIN_STEP)


class TrainStep(WorkerPhase):
    """Train for one step. The engine keeps its weights until they are synced.

    Attributes:
        peak_below: an earlier training step, of the same cycle if both are repeated, that ran with
            the KV cache on the devices. This one runs without it, and its peak must be lower by
            exactly the cache's bytes.
    """

    peak_below: str | None = None

    @override
    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        return replace(self, peak_below=self.peak_below and cycle.name(self.peak_below))

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        compared = (trained(self.peak_below),) if self.peak_below else ()
        return Effect(
            needs=(ENGINE, TRAINER_LIVE, *compared),
            forbids=(KV_LIVE,) if self.peak_below else (),
            adds=(TRAINER_AHEAD, trained(self.step)),
            pools={TRAINER_PROGRAM: Size.TRAINER_PROGRAM},
            runs=_PROGRAMS,
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import kv_cache

        # The model that it began with: the files, which take no memory of the devices.
        reference = ctx.hf_weights(None) if ctx.config.trainer.has_reference else None
        report = ctx.trainer.step(self._batch(ctx), reference)
        ctx.step_peaks[self.step] = report.peak_bytes
        checks = [check_equal("step_is_in_place", report.set_bytes, report.in_place_bytes)]
        checks += self._temporaries_checks(ctx, report.temp_bytes)
        if self.peak_below is not None:
            lower = ctx.step_peaks[self.peak_below] - report.peak_bytes
            checks += [check_equal("kv_drop_lowers_peak", kv_cache.nbytes(ctx.engine), lower)]
        rewards = ctx.rewarded.numbers if ctx.rewarded and ctx.config.trainer.rewarded else {}
        return Result({**report.fields, **rewards}, tuple(checks))

    def _temporaries_checks(self, ctx: WorkerContext, temp_bytes: int) -> list[Check]:
        """Return the check of a device's temporaries against the plan, if its programs are in it."""
        planned, plan = ctx.planned_temporaries, ctx.config.plan
        if not plan.enforce or not planned.keys() >= {*_PROGRAMS}:
            return []
        expected = max(planned[program] for program in _PROGRAMS)
        # A plan for a TPU was made without one.
        allowed = 0 if ctx.config.engine.device == "cpu" else plan.allowance_bytes
        passed = abs(temp_bytes - expected) <= allowed
        detail = f"bytes on a device, within {allowed}"
        return [Check("step_temporaries", expected, temp_bytes, passed, detail)]

    def _batch(self, ctx: WorkerContext) -> "Batch | None":
        """Return the examples or samples of the step; None if its gradients are seeded."""
        from kvpipe.trainer import batch

        config = ctx.config.trainer
        if not config.learns:
            return None
        if config.rewarded:
            found = ctx.rewarded
            if found is None:
                raise PhaseError("no samples have been rewarded")
            samples = batch.examples_of_samples(found.rollout, ctx.ids_by_prompt, found.advantages)
            return batch.batch_of(samples, config)
        return batch.batch_of(
            batch.examples_of_step(ctx.examples, ctx.trainer.steps, config), config
        )
