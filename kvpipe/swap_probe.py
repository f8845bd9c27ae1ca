"""Show that a swap of weights changed what the engine computes.

A swap that did nothing would pass every other check.
"""

from dataclasses import replace

from kvpipe.context import Output, WorkerContext
from kvpipe.records import Check


class SwapProbe:
    """A few greedy tokens before and after a swap; each time the prefix cache is flushed."""

    def __init__(self, ctx: WorkerContext, tokens: int) -> None:
        """Generate ``tokens`` tokens under the old weights; 0 makes no probe."""
        self._ctx = ctx
        self._tokens = tokens
        self._before = self._generate() if tokens else None

    def checks(self) -> tuple[Check, ...]:
        """Generate under the new weights; return the check that the ids differ, if there is one."""
        if self._before is None:
            return ()
        before, after = self._before.token_ids, self._generate().token_ids
        check = Check(
            "swap_changed_output",
            f"other token ids than {list(before)}",
            list(after),
            before != after,
            "the same prompt, greedy, under the old and under the new weights",
        )
        return (check,)

    def _generate(self) -> Output:
        sampling = self._ctx.config.sampling
        greedy = replace(sampling, max_new_tokens=self._tokens, temperature=0.0, ignore_eos=True)
        output = self._ctx.engine.generate(self._ctx.prompt, greedy)
        self._ctx.engine.flush()
        return output
