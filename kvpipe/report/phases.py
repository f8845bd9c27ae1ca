"""The phases as JSON and as Markdown, which a terminal shows too."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvpipe.pipeline import facts
from kvpipe.pipeline.description import Option, PhaseDoc
from kvpipe.pipeline.ledger import KvTokens, PoolSize, Size
from kvpipe.pipeline.phase import Effect
from kvpipe.report.plan import markdown_table

_SIZES = {
    Size.NOTHING: "nothing",
    Size.PARAMS: "a set of parameters",
    Size.KV: "the KV cache",
    Size.PROGRAM: "compiled programs",
    Size.TRAINER_PROGRAM: "the trainer's compiled programs",
    Size.TRAINER_PARAMS: "the trainer's parameters",
    Size.TRAINER_GRADIENTS: "the trainer's gradients",
    Size.TRAINER_MOMENTS: "the trainer's moments",
}
_FACTS = ("needs", "forbids", "adds", "removes")


def as_json(phases: Sequence[PhaseDoc]) -> list[dict[str, Any]]:
    """Return the phases as ``describe.format=json`` prints them; facts have their words beside."""
    return [{**asdict(phase), "effect": _effect_json(phase.effect)} for phase in phases]


def as_markdown(phases: Sequence[PhaseDoc]) -> str:
    """Return the phases as a Markdown document."""
    return "\n".join(line for phase in phases for line in _markdown(phase))


def effect_rows(effect: Effect) -> dict[str, str]:
    """Return the parts of an effect that are not empty, in words by heading."""
    words = {
        name: "; ".join(facts.meaning(fact).what for fact in getattr(effect, name))
        for name in _FACTS
    }
    pools = effect.pools.items()
    words["pools"] = "; ".join(f"{pool} has {_size_words(size)}" for pool, size in pools)
    return {name: text for name, text in words.items() if text}


def _default(option: Option) -> str:
    """Return what is used if a step does not give the option, as YAML has it."""
    value = option.default
    if option.required:
        return "required"
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def _size_words(size: PoolSize) -> str:
    if isinstance(size, KvTokens):
        return f"{_SIZES[Size.KV]} of {size.tokens} tokens"
    return _SIZES[size]


def _effect_json(effect: Effect) -> dict[str, Mapping[str, Any]]:
    named = {
        name: {fact: facts.meaning(fact).what for fact in getattr(effect, name)} for name in _FACTS
    }
    pools = {
        pool: asdict(size) if isinstance(size, KvTokens) else str(size)
        for pool, size in effect.pools.items()
    }
    return {**named, "pools": pools}


def _markdown(phase: PhaseDoc) -> Iterator[str]:
    yield from (f"## `{phase.name}`", "", phase.summary, "")
    if phase.options:
        rows = [
            [f"`{o.name}`", o.type, f"`{_default(o)}`", o.meaning.replace("``", "`")]
            for o in phase.options
        ]
        yield from markdown_table(["option", "type", "default", "meaning"], rows, texts=4)
        yield ""
    yield from (f"- {heading}: {words}" for heading, words in effect_rows(phase.effect).items())
    yield f"- runs in: the {phase.runs_in}"
    if phase.origin:
        yield f"- from: {phase.origin}"
    yield ""
