"""Begin a rollout and stop it with requests half-way: their tokens stay in the KV cache.

The cache may then be offloaded, others use its memory, and other weights may be brought into the engine;
``rollout_resumed`` finishes the rollout.
"""

from dataclasses import asdict, replace
from typing import Self, override

from kvpipe.config.schema import at_least, checked
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.facts import IN_FLIGHT
from kvpipe.pipeline.phase import Effect, Result
from kvpipe.pipeline.sampled import RollingOutPhase


class RolloutPaused(RollingOutPhase):
    """Roll out until the pause.

    Attributes:
        pause_after_tokens: new tokens, of all samples together, after which the engine stops between
            two steps; if no sample is half-way just then, it is some steps later.
        seed: seed of the random numbers, without a unit; null draws one. In the later cycles of
            repeated steps it is one more each time.
    """

    pause_after_tokens: int = checked(1, at_least(1))

    @override
    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        return replace(self, seed=None if self.seed is None else self.seed + cycle.number - 1)

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        return replace(self.rolling_out(IN_FLIGHT), pauses_after=self.pause_after_tokens)

    @override
    def run(self, ctx: WorkerContext) -> Result:
        from kvpipe.engine import rollout

        sampling = self.draw_sampling()
        requests = self.requests(ctx, sampling.seed)
        ctx.in_flight = rollout.pause(ctx.engine, requests, sampling, self.pause_after_tokens)
        paused = ctx.in_flight.at_pause
        fields = {"sampling_params": asdict(sampling)} | paused.fields
        return Result(fields, tuple(paused.checks()))
