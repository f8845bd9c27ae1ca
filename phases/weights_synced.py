"""Bring the trained weights into the live engine: on the devices, leaf by leaf, no second set."""

from dataclasses import dataclass

from kvpipe import facts, ledger
from kvpipe.context import WorkerContext
from kvpipe.errors import PhaseError
from kvpipe.phase import WEIGHT_SYNC, Effect, Result, Size, WorkerPhase
from kvpipe.records import check_equal


@dataclass(frozen=True)
class WeightsSynced(WorkerPhase):
    """Sync the trainer's parameters into the engine; the prefix cache is flushed."""

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave the trainer's weights in the engine and an empty prefix cache."""
        return Effect(
            needs=(facts.ENGINE, facts.TRAINER_LIVE),
            # A slot that shares the old arrays would keep them alive beside the new ones.
            forbids=tuple(map(facts.shared, facts.shared_slots(before))),
            leaves=(facts.WEIGHTS_LIVE, facts.WEIGHTS_REAL),
            takes=(
                facts.TRAINER_AHEAD,
                facts.KV_WRITTEN,
                facts.KV_STALE,
                facts.KV_OFFLOADED,
                facts.WEIGHTS_OFFLOADED,
            ),
            pools={
                ledger.PARAMS: Size.PARAMS,
                ledger.TRAINER_PROGRAM: Size.TRAINER_PROGRAM,
            },
            runs=(WEIGHT_SYNC,),
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Sync.

        Raises:
            PhaseError: there is no trainer.
            EngineError: the trained weights are not finite; the engine keeps its old ones.
        """
        import time

        from kvpipe.engine import memory, training, weights

        if ctx.trainer is None:
            raise PhaseError("there is no trainer to take the weights from")
        held = weights.live_bytes(ctx.engine)
        began = time.monotonic()
        change = training.sync(ctx.engine, ctx.trainer.params)
        sync_s = time.monotonic() - began
        ctx.kv = ctx.weights = None
        memory.give_back_host_memory()
        fields = {
            "num_params": change.num_params,
            "param_bytes": change.param_bytes,
            "trained_steps": ctx.trainer.steps,
            "sync_s": round(sync_s, 6),
        }
        grown = check_equal("sync_leaves_one_set", change.param_bytes - held, change.changed_bytes)
        return Result(fields, (grown,))
