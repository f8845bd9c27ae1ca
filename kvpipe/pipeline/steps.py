"""Build frozen steps from the config: resolve each name to its phase file and check its options.

The options of a step are the fields of the phase's dataclass, so the run uses exactly what is
checked here. Nothing here may import jax.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from types import UnionType
from typing import Any, Union, get_args, get_origin

from kvpipe.config.schema import Kvpipe, refuse_wrong
from kvpipe.errors import InputError
from kvpipe.pipeline.cycles import (
    CYCLE_MARK,
    SAVED,
    Cycle,
    base_name,
    cycle_of,
    repeated,
    repeated_steps,
)
from kvpipe.pipeline.phase import ParentPhase, Phase
from kvpipe.pipeline.phase_files import (
    blamed_on,
    check_path,
    option_types,
    origin_of,
    phase_class,
)
from kvpipe.records.run import RUN_RECORDS
from kvpipe.suggest import nearest
from kvpipe.system.plugins import Origin


def build_steps(config: Kvpipe) -> tuple[Phase, ...]:
    """Return the steps of the pipeline, in order.

    Raises:
        InputError: a directory of ``phase_path`` does not exist, a step is named twice, a name in
            ``phases`` is not a step, a step's ``use``, option or value is wrong, or a parent phase
            comes after a worker phase.
    """
    check_path(config.phase_path)
    _check_names(config)
    names = step_names(config)
    stretch = repeated_steps(config.pipeline, config.repeat)
    saved = [SAVED] if config.trainer.checkpoint_every else []
    kind_of = cache(partial(_kind, config))
    first = {name: _build_step(name, config, kind_of) for name in [*config.pipeline, *saved]}
    steps = tuple(first.get(name) or _in_later_cycle(name, first, stretch) for name in names)
    in_worker = ""
    for step in steps:
        if isinstance(step, ParentPhase) and in_worker:
            raise InputError(
                f"pipeline: {step.step!r} runs before the engine's process is started, "
                f"so it must come before {in_worker!r}"
            )
        if not isinstance(step, ParentPhase):
            in_worker = in_worker or step.step
    return steps


def step_names(config: Kvpipe) -> list[str]:
    """Return the names of all steps of a pipeline, in order, with those of every cycle."""
    return repeated(config.pipeline, config.repeat, config.trainer.checkpoint_every)


def saving_step(config: Kvpipe, cycle: int) -> Phase:
    """Return the step that saves the trainer's state of a cycle."""
    step = _build_step(SAVED, config, partial(_kind, config))
    return replace(step, step=Cycle(cycle, frozenset({SAVED})).name(SAVED))


def use_of(step: str, config: Kvpipe) -> str:
    """Return the name of a step's phase.

    Raises:
        InputError: it is not a string.
    """
    name = base_name(step)
    return _typed(config.phases.get(name, {}).get("use", name), str, f"phases.{name}.use")


def origins(config: Kvpipe) -> dict[str, Origin]:
    """Return the phases of a pipeline that are not kvpipe's own, and where the code of each is.

    Raises:
        InputError: one of them cannot be executed any more.
    """
    uses = sorted({use_of(name, config) for name in config.pipeline})
    found = {use: origin_of(use, config.phase_path) for use in uses}
    return {use: origin for use, origin in found.items() if origin}


def _check_names(config: Kvpipe) -> None:
    if not config.pipeline:
        raise InputError("pipeline: it has no steps")
    for name in config.pipeline:
        _typed(name, str, "pipeline")  # OmegaConf accepts a list as an item of list[str]
    times = Counter(config.pipeline)
    for name in config.pipeline:
        if CYCLE_MARK in name:
            raise InputError(
                f"pipeline: {name!r} has a {CYCLE_MARK!r}, which marks the cycles of repeated "
                "steps; choose another name"
            )
        if name in RUN_RECORDS:
            raise InputError(
                f"pipeline: {name!r} is the name of a record of the run, so no step can have it; "
                "choose another name"
            )
        if name == SAVED:
            raise InputError(
                f"pipeline: trainer.checkpoint_every adds the step {SAVED!r}, at the end of cycles; "
                "leave it out"
            )
        if times[name] > 1:
            raise InputError(
                f"pipeline: {name!r} occurs {times[name]} times; "
                f"give each its own name and set 'phases.<name>.use: {use_of(name, config)}'"
            )
    if config.trainer.checkpoint_every:
        if config.repeat is None:
            raise InputError(
                f"trainer.checkpoint_every is {config.trainer.checkpoint_every}, but the pipeline "
                "has no cycles; give them with repeat"
            )
        times[SAVED] = 1
    for key, names in (
        ("phases", config.phases),
        ("runner.phase_timeouts", config.runner.phase_timeouts),
    ):
        for name in names:
            if name not in times:
                raise InputError(
                    f"{key}.{name}: the pipeline has no step {name!r}; "
                    f"{nearest(name, config.pipeline)}"
                )


@dataclass(frozen=True)
class _Kind:
    """Class and options of a phase, found once for all of its steps, because finding them reads its file.

    Attributes:
        cls: class of the phase.
        types: option → its type.
        defaults: option → its value by the config.
        required: options without a default.
    """

    cls: type[Phase]
    types: Mapping[str, Any]
    defaults: Mapping[str, Any]
    required: frozenset[str]


def _kind(config: Kvpipe, use: str) -> _Kind:
    cls = phase_class(use, config.phase_path)
    with blamed_on(cls):
        defaults = cls.defaults(config)
    required = {f.name for f in fields(cls) if f.default is f.default_factory} - {"step"}
    return _Kind(cls, option_types(cls), defaults, frozenset(required - set(defaults)))


def _build_step(name: str, config: Kvpipe, kind_of: Callable[[str], _Kind]) -> Phase:
    use = use_of(name, config)
    given = {key: value for key, value in config.phases.get(name, {}).items() if key != "use"}
    try:
        kind = kind_of(use)
    except InputError as error:
        raise InputError(f"pipeline step {name!r}: {error}") from None
    for option, value in given.items():
        if option not in kind.types:
            hint = nearest(option, kind.types)
            raise InputError(f"phases.{name}.{option}: {use} has no option {option!r}; {hint}")
        given[option] = _typed(value, kind.types[option], f"phases.{name}.{option}")
    if missing := sorted(kind.required - set(given)):
        raise InputError(f"phases.{name}: {use} needs the option {missing[0]!r}")
    with blamed_on(kind.cls):
        try:
            options = {**kind.defaults, **given}
            refuse_wrong(kind.cls, options)  # before the phase looks at how they go together
            return kind.cls(step=name, **options)
        except InputError as error:
            raise InputError(f"phases.{name}.{error}") from None


def _in_later_cycle(step: str, first: Mapping[str, Phase], stretch: frozenset[str]) -> Phase:
    """Return a step of a later cycle, made from the same step of the first."""
    name = base_name(step)
    phase = first[name]
    with blamed_on(type(phase)):
        try:
            return replace(phase, step=step).in_later_cycle(name, Cycle(cycle_of(step), stretch))
        except InputError as error:
            raise InputError(f"phases.{name}.{error}") from None


def _typed(value: Any, expected: Any, where: str) -> Any:
    """Return ``value`` as ``expected``, lists as tuples and integers as floats; or refuse it."""
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        (expected,) = (arg for arg in args if arg is not type(None))
        return _typed(value, expected, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, args[0], where) for item in value)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        wanted = "list" if origin is tuple else expected.__name__
        raise InputError(f"{where}: {value!r} is of type {type(value).__name__}, not {wanted}")
    return value
