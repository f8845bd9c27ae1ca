"""Records to and from JSON, by the type hints of their fields."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class JsonRecord:
    """A record that is one JSON line: serialised once, or not at all if it was read.

    The object has the record's fields in their order; the keys of a field called ``fields`` follow
    them. Its first key ``phase`` has the class's ``tag`` or, for a phase, the field of that name.
    """

    tag: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the record."""
        return json.loads(self.line)

    @cached_property
    def line(self) -> str:
        """The record as one JSON line, without its newline."""
        # ASCII: some readers split lines at U+2028, which a text may contain.
        return json.dumps(self._object(), allow_nan=False, default=fields_of)

    def _object(self) -> dict[str, Any]:
        """Return the record as an object whose values json can convert; some are dataclasses."""
        known = fields_of(self)
        more = known.pop("fields", {})
        return ({"phase": self.tag} if self.tag else {}) | known | more

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record whose JSON object is ``data``.

        Raises:
            KeyError, TypeError: it is no such record.
        """
        data = {key: value for key, value in data.items() if not (cls.tag and key == "phase")}
        names = {field.name for field in fields(cls)}
        if "fields" in names:
            known = {key: data.pop(key) for key in names - {"fields"} if key in data}
            data = {**known, "fields": data}
        return decode(cls, data)


def decode(hint: Any, value: Any) -> Any:
    """Return the value of a type from its JSON value.

    Args:
        hint: a dataclass, ``Sequence``, ``tuple``, ``Mapping``, one of these ``| None``, or any
            type that is the same in JSON.
        value: the JSON value; a tuple has become a list in it, and a dataclass an object.

    Raises:
        TypeError: a dataclass has no such field, or lacks one.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"{hint.__name__} must be an object, not {value!r}")
        hints = _hints(hint)
        return hint(**{name: decode(hints.get(name), item) for name, item in value.items()})
    if origin is UnionType:
        (kind,) = (kind for kind in arguments if kind is not NoneType)
        return None if value is None else decode(kind, value)
    if origin in (Sequence, tuple):
        return tuple(decode(arguments[0], item) for item in value)
    if origin is Mapping:
        return {key: decode(arguments[1], item) for key, item in value.items()}
    return value


_hints = cache(get_type_hints)


def fields_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as they are, the dataclasses in them too.

    Raises:
        TypeError: it is none, so JSON has no such value.
    """
    if not is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"Object of type {type(record).__name__} is not JSON serializable")
    return {field.name: getattr(record, field.name) for field in fields(record)}
