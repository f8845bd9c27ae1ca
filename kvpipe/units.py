"""Format sizes for people; everywhere else sizes are integers in bytes."""

from dataclasses import dataclass

_GIB = 1024**3


@dataclass(frozen=True)
class Unit:
    """A unit of sizes.

    Attributes:
        name: its symbol.
        size: its bytes.
    """

    name: str
    size: int


_UNITS = (Unit("TiB", 1024**4), Unit("GiB", _GIB), Unit("MiB", 1024**2), Unit("KiB", 1024))
_BYTE = Unit("B", 1)


def gib(size: int) -> str:
    """Return bytes as GiB in five characters, for anything below 100 TiB."""
    return _digits(size / _GIB)


def unit_for(size: int) -> Unit:
    """Return the largest unit that is not larger than ``size``."""
    return next((unit for unit in _UNITS if abs(size) >= unit.size), _BYTE)


def sized(size: int) -> str:
    """Return bytes in a suitable unit, e.g. ``20.53 MiB``."""
    unit = unit_for(size)
    if unit is _BYTE:
        return f"{size} B"
    return f"{'-' if size < 0 else ''}{_digits(abs(size) / unit.size)} {unit.name}"


def _digits(amount: float) -> str:
    digits = 3 if amount < 9.9995 else 2 if amount < 99.995 else 1 if amount < 999.95 else 0
    return f"{amount:.{digits}f}"
