"""Changes to the list of steps that need no file: ``pipeline_edit``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpipe.errors import InputError
from kvpipe.suggest import nearest

_KEY = "pipeline_edit"


@dataclass
class PipelineEdit:
    """Changes to the list of steps, which the command line can make without a file.

    A value is the name of a step, a list of names, or None for no change. Every position is that of
    ``pipeline`` as it is written; a step that goes takes its options and its time limit along.

    Attributes:
        before: step → steps to insert before it.
        after: step → steps to insert after it.
        replace: step → steps in its place.
        remove: steps to leave out.
    """

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    replace: dict[str, Any] = field(default_factory=dict)
    remove: Any = None

    def of(self, pipeline: Sequence[str]) -> list[str]:
        """Return the list of steps after the changes.

        Raises:
            InputError: a change names a step that the pipeline lacks, one step is both replaced and
                removed, or a value is neither a name nor a list of names.
        """
        removed = frozenset(_names("remove", self.remove))
        for key, given in self._by_step().items():
            for step in given:
                _refuse_unknown(f"{key}.{step}", step, pipeline)
        for step in removed:
            _refuse_unknown("remove", step, pipeline)
            if step in self.replace:
                raise InputError(f"{_KEY}: {step!r} is in remove and in replace; leave one out")
        return [name for step in pipeline for name in self._in_place_of(step, removed)]

    def __bool__(self) -> bool:
        return bool(self.remove or any(self._by_step().values()))

    def _by_step(self) -> Mapping[str, Mapping[str, Any]]:
        return {"before": self.before, "after": self.after, "replace": self.replace}

    def _in_place_of(self, step: str, removed: frozenset[str]) -> Iterator[str]:
        yield from _names(f"before.{step}", self.before.get(step))
        if self.replace.get(step) is not None:
            yield from _names(f"replace.{step}", self.replace[step])
        elif step not in removed:
            yield step
        yield from _names(f"after.{step}", self.after.get(step))


def _names(key: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{_KEY}.{key} is {value!r}, it must be the name of a step or a list of names"
        )
    return names


def _refuse_unknown(key: str, step: str, pipeline: Sequence[str]) -> None:
    if step not in pipeline:
        raise InputError(
            f"{_KEY}.{key}: the pipeline has no step {step!r}; {nearest(step, pipeline)}"
        )
