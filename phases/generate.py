"""Generate text from the prompt and compare it, on token ids, with what an earlier step gave."""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from kvpipe import facts, ledger
from kvpipe.context import Output, WorkerContext
from kvpipe.cycles import Cycle
from kvpipe.errors import InputError
from kvpipe.phase import Effect, Kind, Result, Size, WorkerPhase
from kvpipe.records import Check, check_equal
from kvpipe.schema import Kvpipe, SamplingConfig

REAL, ANY = "real", "any"


@dataclass(frozen=True)
class Generate(WorkerPhase):
    """Generate.

    Attributes:
        max_new_tokens: tokens to generate at most; follows ``sampling.max_new_tokens``.
        temperature: divides the logits, without a unit; 0.0 is greedy. Follows
            ``sampling.temperature``.
        ignore_eos: go on after an end-of-sequence token; follows ``sampling.ignore_eos``.
        same_output_as: name of an earlier step whose token ids these have to equal.
        aa_control: this step repeats ``same_output_as`` with nothing changed between them. If they
            differ, the engine itself is to blame, and what comes later proves nothing about KV.
        different_output_from: name of an earlier step, of the same cycle if both are repeated,
            whose token ids these must not be: the weights have been changed between them.
        same_output_as_before: in the second and later cycles, name of a step of the cycle before
            whose token ids these have to equal. With neither this nor ``same_output_as`` nor
            ``different_output_from``, that is this step itself in the first cycle.
        same_cached_tokens_as: name of an earlier step that found as many tokens of its prompt in the
            prefix cache as this one has to.
        weights: ``real`` refuses dummy weights, ``any`` takes what is there.
        log_text: send prompt and text to W&B as media and files.
    """

    max_new_tokens: int
    temperature: float
    ignore_eos: bool
    same_output_as: str | None = None
    aa_control: bool = False
    different_output_from: str | None = None
    same_output_as_before: str | None = None
    same_cached_tokens_as: str | None = None
    weights: str = REAL
    log_text: bool = False

    kind: ClassVar[Kind] = Kind.MEASURES

    def __post_init__(self) -> None:
        try:
            _ = self.sampling  # refuses here what the engine would refuse after ten minutes
        except InputError as error:
            raise InputError(str(error).removeprefix("sampling.")) from None
        if self.aa_control and self.same_output_as is None:
            raise InputError("aa_control is true, but same_output_as names no step to compare with")
        if self.weights not in (REAL, ANY):
            raise InputError(f"weights is {self.weights!r}; valid are: {REAL}, {ANY}")

    @property
    def sampling(self) -> SamplingConfig:
        """The sampling parameters of this step."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.ignore_eos)

    @classmethod
    def defaults(cls, config: Kvpipe) -> dict[str, Any]:
        """Take the sampling parameters from ``sampling``."""
        return asdict(config.sampling)

    def in_later_cycle(self, first: str, cycle: Cycle) -> Self:
        """Compare with the outputs of this cycle, of the one before or of the first."""
        same = self.same_output_as
        if self.same_output_as_before is not None:
            same = cycle.before.name(self.same_output_as_before)
        elif self.different_output_from is None:
            same = same or first
        other = self.different_output_from and cycle.name(self.different_output_from)
        return replace(self, same_output_as=same, different_output_from=other)

    def effect(self, before: frozenset[str]) -> Effect:
        """Leave an output and a prefix cache in use."""
        earlier = (
            self.same_output_as,
            self.different_output_from,
            self.same_cached_tokens_as,
        )
        compared = tuple(facts.output(step) for step in earlier if step)
        real = () if self.weights == ANY else (facts.WEIGHTS_REAL,)
        logged = (facts.WANDB,) if self.log_text else ()
        return Effect(
            needs=(facts.ENGINE, facts.KV_LIVE, facts.WEIGHTS_LIVE, *real, *logged, *compared),
            forbids=(facts.KV_STALE,),
            leaves=(facts.KV_WRITTEN, facts.output(self.step)),
            pools={ledger.PROGRAM: Size.PROGRAM},
        )

    def run(self, ctx: WorkerContext) -> Result:
        """Generate.

        Raises:
            EngineError: the engine failed.
        """
        output = ctx.engine.generate(ctx.prompt, self.sampling)
        ctx.outputs[self.step] = output
        fields = {
            "prompt": ctx.prompt,
            "prompt_sha256": _sha256(ctx.prompt),
            "prompt_tokens": output.prompt_tokens,
            "sampling_params": asdict(self.sampling),
            "text": output.text,
            "text_sha256": _sha256(output.text),
            "token_ids": output.token_ids,
            "cached_tokens": output.cached_tokens,
            "raw": output.raw,
            "log_text": self.log_text,
        }
        checks = (_not_empty(output),)
        if self.same_output_as is not None:
            earlier = ctx.output_of(self.same_output_as)
            same = same_output(earlier, output)
            if self.aa_control:
                same = replace(same, name="aa_control")
            fields["same_output"] = int(same.passed)
            fields["text_sha256_before"] = _sha256(earlier.text)
            checks = (*checks, same)
        if self.different_output_from is not None:
            earlier = ctx.outputs[self.different_output_from]
            checks = (*checks, different_output(self.different_output_from, earlier, output))
        if self.same_cached_tokens_as is not None:
            expected = ctx.output_of(self.same_cached_tokens_as).cached_tokens
            checks = (*checks, check_equal("same_cached_tokens", expected, output.cached_tokens))
        return Result(fields, checks)


def _not_empty(output: Output) -> Check:
    count = len(output.token_ids)
    return Check("output_not_empty", "at least 1 token", count, count > 0)


def same_output(earlier: Output, later: Output) -> Check:
    """Return the check that two outputs have the same token ids, of which there is at least one."""
    a, b = earlier.token_ids, later.token_ids
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    detail = ""
    if not a:
        detail = "the earlier output is empty"
    elif differ:
        i = differ[0]
        detail = f"the first differing token is at index {i}: {a[i]} before, {b[i]} now"
    elif len(a) != len(b):
        detail = f"the first {min(len(a), len(b))} tokens agree, then one output ends"
    return Check("same_output", list(a), list(b), bool(a) and a == b, detail)


def different_output(step: str, earlier: Output, later: Output) -> Check:
    """Return the check that two outputs have other token ids; ``step`` gave the earlier one."""
    a, b = earlier.token_ids, later.token_ids
    expected = f"other token ids than {list(a)}"
    return Check("different_output", expected, list(b), a != b, f"those of step {step!r}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
