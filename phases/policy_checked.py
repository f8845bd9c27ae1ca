"""Compare the trainer's log-probabilities of samples with those that the engine sampled them with.

In float32 a difference of 0.001 fails ``policy_is_synced``; in bfloat16 the two forward passes round
differently, so the differences are only recorded.
"""

from collections.abc import Sequence
from typing import override

from kvpipe.errors import PhaseError
from kvpipe.pipeline import facts
from kvpipe.pipeline.about_rollout import AboutRollout
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.facts import (
    ENGINE,
    IN_FLIGHT,
    IN_FLIGHT_STALE,
    TRAINER_AHEAD,
    TRAINER_LIVE,
)
from kvpipe.pipeline.ledger import POLICY_SCORES, TRAINER_PROGRAM, Size
from kvpipe.pipeline.phase import Effect, Result
from kvpipe.pipeline.rollout import Piece
from kvpipe.units import counted


class PolicyChecked(AboutRollout):
    """Check that the engine samples from the model that the trainer has.

    The rollout came after the last sync. Of one that went on under new weights, the tokens of the
    engine's weights are compared; the record has the number of the others. Null for ``of`` is the
    rollout that is paused, with the tokens that it has.
    """

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return Effect(
            needs=(ENGINE, TRAINER_LIVE, IN_FLIGHT if self.of is None else facts.rollout(self.of)),
            forbids=(TRAINER_AHEAD, IN_FLIGHT_STALE if self.of is None else facts.mixed(self.of)),
            pools={TRAINER_PROGRAM: Size.TRAINER_PROGRAM},
            runs=(POLICY_SCORES,),
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.trainer import policy
        from kvpipe.trainer.batch import batch_of_pieces

        pieces, total = self._pieces(ctx)
        others = {"policy_tokens_of_other_weights": total - sum(len(p.token_ids) for p in pieces)}
        if total == others["policy_tokens_of_other_weights"]:
            raise PhaseError(
                f"none of the {counted(total, 'token')} of step {self.of!r} was sampled with the "
                f"engine's weights, whose digest is {ctx.engine.proof.whole}"
            )
        config = ctx.config
        batch = batch_of_pieces(pieces, ctx.ids_by_prompt, config.trainer)
        found = policy.compared(batch, ctx.trainer.logprobs(batch))
        exact = config.engine.dtype == config.trainer.dtype == "float32"
        return Result(found.fields | others, (found.check(pieces),) if exact else ())

    def _pieces(self, ctx: WorkerContext) -> tuple[Sequence[Piece], int]:
        """Return the tokens of each sample that the engine's weights made, and the number of all."""
        if self.of is None:
            paused = ctx.paused_rollout
            return paused.made, sum(paused.at_pause.tokens)
        rollout = ctx.rollout_of(self.of)
        return list(rollout.pieces(ctx.engine.proof.whole)), rollout.decode_tokens
