"""Description of a phase, read off its own code without running it.

Options are the fields of its dataclass, with the meanings of its docstring; its effect is the one that
the plan folds. So the description cannot differ from what runs.
"""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, get_args

from kvpipe.config.schema import Kvpipe
from kvpipe.errors import InputError
from kvpipe.pipeline import facts
from kvpipe.pipeline.phase import Effect, Phase
from kvpipe.pipeline.steps import PHASES_PACKAGE, option_types, phase_class

_ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
_CHOICE = re.compile(r"``(\w+)``")


@dataclass(frozen=True)
class Option:
    """An option of a phase.

    Attributes:
        name: its key below ``phases.<step>``.
        type: its type as YAML has it, e.g. ``int`` or ``str or null``.
        required: whether a step has to give it.
        default: what it is if a step does not give it; None if it is required.
        meaning: what it is, with its unit.
    """

    name: str
    type: str
    required: bool
    default: Any
    meaning: str


@dataclass(frozen=True)
class Variant:
    """Difference that another value of an option makes to the effect.

    Attributes:
        option: the option.
        value: the value; ``NAME`` stands for any.
        more: parts that the effect has only with this value.
        less: parts that it has only without it.
    """

    option: str
    value: Any
    more: Effect
    less: Effect


@dataclass(frozen=True)
class PhaseDoc:
    """A phase.

    Attributes:
        name: its name in ``use``.
        summary: its purpose, in a sentence.
        runs_in: ``worker`` (the engine's process) or ``parent``.
        options: its options.
        effect: its effect with its defaults, with every pool that it changes; ``SLOT`` and ``STEP``
            stand for any.
        variants: what other values of its options change in that.
    """

    name: str
    summary: str
    runs_in: str
    options: tuple[Option, ...]
    effect: Effect
    variants: tuple[Variant, ...] = field(default_factory=tuple)


def describe(use: str, config: Kvpipe) -> PhaseDoc:
    """Return the description of the phase ``use``; some defaults come from ``config``.

    Raises:
        InputError: there is no such phase.
    """
    cls = phase_class(use)
    module = importlib.import_module(f"{PHASES_PACKAGE}.{use}")
    options = tuple(_options(cls, config))
    given = {o.name: o.name.upper() if o.required else o.default for o in options}
    effect = _effect(cls, given)
    return PhaseDoc(
        name=use,
        summary=_first_paragraph(module.__doc__),
        runs_in=cls.runs_in,
        options=options,
        effect=effect,
        variants=tuple(_variants(cls, options, given, effect)),
    )


def meanings(cls: type[Phase]) -> dict[str, str]:
    """Return the meaning of each option that the docstring of a phase's class explains."""
    _, _, section = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if entry := _ENTRY.fullmatch(line.removeprefix("    ")):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def _options(cls: type[Phase], config: Kvpipe) -> Iterator[Option]:
    from_config, explained = cls.defaults(config), meanings(cls)
    types = option_types(cls)
    for f in fields(cls):
        if f.name in types:
            required = f.default is f.default_factory and f.name not in from_config
            default = None if required else from_config.get(f.name, f.default)
            kind = _type_name(types[f.name])
            yield Option(f.name, kind, required, default, explained.get(f.name, ""))


def _type_name(kind: Any) -> str:
    if NoneType in get_args(kind):
        inner = next(arg for arg in get_args(kind) if arg is not NoneType)
        return f"{_type_name(inner)} or null"
    if kind == tuple[str, ...]:
        return "list of str"
    return kind.__name__


def _effect(cls: type[Phase], options: Mapping[str, Any]) -> Effect:
    """Return the effect of a phase after a swap of some slot, with every pool that it changes."""
    effect = cls(step="STEP", **options).effect_given(frozenset({facts.shared("SLOT")}))
    before = frozenset(effect.needs)
    return replace(
        effect, pools={**facts.changed_pools(before, effect.after(before)), **effect.pools}
    )


def _variants(
    cls: type[Phase], options: tuple[Option, ...], given: Mapping[str, Any], effect: Effect
) -> Iterator[Variant]:
    """Yield the other values of options that change the effect."""
    for option in options:
        for value in _other_values(option):
            try:
                other = _effect(cls, {**given, option.name: value})
            except InputError:
                continue  # not a value of this option, or not without another option
            if other != effect:
                less = _minus(effect, other)
                # A pool that has another size then has that one among what is more.
                gone = {pool: n for pool, n in less.pools.items() if pool not in other.pools}
                less = replace(less, pools=gone)
                yield Variant(option.name, value, _minus(other, effect), less)


def _other_values(option: Option) -> list[Any]:
    """Return values to try: the other truth value, a number, a name, words that the meaning quotes."""
    match option.type:
        case "bool":
            return [not option.default]
        case "int":
            return [0]
        case "int or null":
            return [1]
        case "list of str":
            return [("NAME",)]
        case "str or null":
            return ["NAME"]
        case "str" if not option.required:
            return [word for word in _CHOICE.findall(option.meaning) if word != option.default]
        case _:
            return []


def _minus(a: Effect, b: Effect) -> Effect:
    """Return the parts of ``a`` that ``b`` lacks."""
    kept = {
        name: tuple(fact for fact in getattr(a, name) if fact not in getattr(b, name))
        for name in ("needs", "forbids", "adds", "removes")
    }
    pools = {pool: size for pool, size in a.pools.items() if b.pools.get(pool) != size}
    return Effect(**kept, pools=pools)


def _first_paragraph(doc: str | None) -> str:
    return " ".join((doc or "").partition("\n\n")[0].replace("``", "").split())
