"""Description of a phase, read off its own code without running it.

Options are the fields of its dataclass, with the meanings of its docstring; its effect is the one that
the plan folds. So the description cannot differ from what runs.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, get_args, get_origin

from kvpipe.config.schema import Kvpipe
from kvpipe.pipeline import facts
from kvpipe.pipeline.phase import Effect, Phase
from kvpipe.pipeline.phase_files import (
    effect_of,
    is_file,
    module_of,
    option_types,
    origin_of,
    phase_class,
)

_ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")


@dataclass(frozen=True)
class Option:
    """An option of a phase.

    ``type`` is its type as YAML has it, e.g. ``str or null``; ``default`` is None if a step must
    give it; ``meaning`` is its sentence in the docstring, with the unit.
    """

    name: str
    type: str
    required: bool
    default: Any
    meaning: str


@dataclass(frozen=True)
class PhaseDoc:
    """A phase: its name in ``use``, its origin, empty for one of kvpipe's, its purpose, the process that runs it, its options and effect.

    The effect is that of its defaults, with every pool that it changes; ``SLOT`` and ``STEP`` stand
    for any.
    """

    name: str
    origin: str
    summary: str
    runs_in: str
    options: tuple[Option, ...]
    effect: Effect


def describe(use: str, config: Kvpipe) -> PhaseDoc:
    """Return the description of the phase ``use``; some defaults come from ``config``.

    Raises:
        InputError: there is no such phase.
    """
    cls = phase_class(use, config.phase_path)
    origin = origin_of(use, config.phase_path)
    text = module_of(cls).__doc__ if is_file(cls) else cls.__doc__
    first_paragraph = (text or "").partition("\n\n")[0]
    options = tuple(_options(cls, config))
    given = {o.name: o.name.upper() if o.required else o.default for o in options}
    return PhaseDoc(
        name=use,
        origin=str(origin or ""),
        summary=" ".join(first_paragraph.replace("``", "").split()),
        runs_in=cls.runs_in,
        options=options,
        effect=_effect(cls, given),
    )


def meanings(cls: type[Phase]) -> dict[str, str]:
    """Return the meaning of each option that a phase's docstring, or that of a base, explains."""
    own = [each for each in cls.__mro__ if each.__module__ != Phase.__module__]
    found: dict[str, str] = {}
    for each in reversed(own):
        found |= _explained(inspect.cleandoc(each.__doc__ or ""))
    return found


def _explained(text: str) -> dict[str, str]:
    """Return the meaning of each name of a docstring's section ``Attributes``."""
    _, _, section = text.partition("\nAttributes:\n")
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
    if get_origin(kind) is tuple:
        return f"list of {get_args(kind)[0].__name__}"
    return kind.__name__


def _effect(cls: type[Phase], options: Mapping[str, Any]) -> Effect:
    """Return the effect of a phase after a swap of some slot, with every pool that it changes."""
    effect = effect_of(cls(step="STEP", **options), frozenset({facts.shared("SLOT")}))
    before = frozenset(effect.needs)
    return replace(
        effect, pools={**facts.changed_pools(before, effect.after(before)), **effect.pools}
    )
