"""Prove that a swap of weights changed the engine's output.

A swap that did nothing would pass every other check.
"""

from dataclasses import replace

from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.output import Output, different_output
from kvpipe.records.run import Check


class SwapProbe:
    """Generates a few greedy tokens before and after a swap, and flushes the prefix cache each time."""

    def __init__(self, ctx: WorkerContext, tokens: int) -> None:
        """Generate ``tokens`` tokens under the old weights; 0 makes no probe."""
        self._ctx = ctx
        self._tokens = tokens
        self._before = self._generate() if tokens else None

    def checks(self) -> tuple[Check, ...]:
        """Generate under the new weights; return the check that the ids differ, if there is a probe."""
        if self._before is None:
            return ()
        detail = "the same prompt, greedy, under the old and under the new weights"
        return (different_output("swap_changed_output", self._before, self._generate(), detail),)

    def _generate(self) -> Output:
        sampling = self._ctx.config.sampling
        greedy = replace(sampling, max_new_tokens=self._tokens, temperature=0.0, ignore_eos=True)
        output = self._ctx.engine.generate(self._ctx.prompt, greedy)
        self._ctx.engine.flush()
        return output
