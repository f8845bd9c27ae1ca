"""Generate text from the prompt and compare its token ids with those of an earlier step."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Self, override

from kvpipe.config.schema import checked, one_of
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.context import WorkerContext
from kvpipe.pipeline.cycles import Cycle
from kvpipe.pipeline.facts import ENGINE, KV_LIVE, WANDB, WEIGHTS_LIVE, WEIGHTS_REAL
from kvpipe.pipeline.ledger import PROGRAM, Size
from kvpipe.pipeline.output import (
    Output,
    different_output,
    not_empty,
    output_proven,
    same_output,
    sha256,
)
from kvpipe.pipeline.phase import Effect, OnFailure, Result
from kvpipe.pipeline.sampled import SampledPhase
from kvpipe.records.run import Check, check_equal

REAL, ANY = "real", "any"


class Generate(SampledPhase):
    """Generate.

    Attributes:
        same_output_as: name of an earlier step whose token ids these must equal.
        aa_control: this step repeats ``same_output_as`` with nothing changed between them. If they
            differ, the engine itself is not deterministic, and later comparisons prove nothing
            about KV.
        different_output_from: name of an earlier step, of the same cycle if both are repeated,
            whose token ids these must not equal: the weights have changed between them.
        same_output_as_before: in the second and later cycles, name of a step of the cycle before
            whose token ids these must equal. With neither this nor ``same_output_as`` nor
            ``different_output_from``, that is this step itself in the first cycle.
        same_cached_tokens_as: name of an earlier step that found the same number of tokens of its
            prompt in the prefix cache.
        weights: ``real`` refuses dummy weights, ``any`` accepts both.
        log_text: send prompt and text to W&B as media and files.
    """

    same_output_as: str | None = None
    aa_control: bool = False
    different_output_from: str | None = None
    same_output_as_before: str | None = None
    same_cached_tokens_as: str | None = None
    weights: str = checked(REAL, one_of(REAL, ANY))
    log_text: bool = False

    on_failure = OnFailure.MAY_CONTINUE

    def __post_init__(self) -> None:
        self.refuse_random(self.same_output_as)
        if self.aa_control and self.same_output_as is None:
            raise InputError("aa_control is true, but same_output_as names no step to compare with")

    @override
    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        same = self.same_output_as
        if self.same_output_as_before is not None:
            same = cycle.before.name(self.same_output_as_before)
        elif self.different_output_from is None:
            same = same or first
        other = self.different_output_from and cycle.name(self.different_output_from)
        return replace(self, same_output_as=same, different_output_from=other)

    @override
    def effect_given(self, before: frozenset[str]) -> Effect:
        earlier = (self.same_output_as, self.different_output_from, self.same_cached_tokens_as)
        compared = tuple(facts.output(step) for step in earlier if step)
        real = () if self.weights == ANY else (WEIGHTS_REAL,)
        logged = (WANDB,) if self.log_text else ()
        return Effect(
            needs=(ENGINE, KV_LIVE, WEIGHTS_LIVE, *real, *logged, *compared),
            forbids=(facts.IN_FLIGHT, facts.KV_STALE),
            adds=(facts.KV_WRITTEN, facts.output(self.step)),
            pools={PROGRAM: Size.PROGRAM},
            new_tokens=self.max_new_tokens,
        )

    @override
    def run(self, ctx: WorkerContext) -> Result:
        sampling = self.draw_sampling()
        output = ctx.outputs[self.step] = ctx.engine.generate(ctx.prompt, sampling)
        checks = tuple(self.checks(ctx, output))
        fields = {
            "prompt": ctx.prompt,
            "prompt_sha256": sha256(ctx.prompt),
            "sampling_params": asdict(sampling),
            **asdict(output),
            "text_sha256": sha256(output.text),
            "log_text": self.log_text,
        }
        if self.same_output_as is not None:
            fields["same_output"] = int(checks[1].passed)
            fields["text_sha256_before"] = sha256(ctx.output_of(self.same_output_as).text)
        return Result(fields, checks)

    def checks(self, ctx: WorkerContext, output: Output) -> Iterator[Check]:
        """Yield the check that ``output`` is not empty, its comparisons with earlier ones, its proof.

        Raises:
            PhaseError: an earlier step has no output, because it failed.
        """
        yield not_empty(output)
        if (step := self.same_output_as) is not None:
            name = "aa_control" if self.aa_control else "same_output"
            yield same_output(name, ctx.output_of(step), output)
        if (step := self.different_output_from) is not None:
            detail = f"compared with step {step!r}"
            yield different_output("different_output", ctx.output_of(step), output, detail)
        if (step := self.same_cached_tokens_as) is not None:
            expected = ctx.output_of(step).cached_tokens
            yield check_equal("same_cached_tokens", expected, output.cached_tokens)
        yield from output_proven(output, self.max_new_tokens)
