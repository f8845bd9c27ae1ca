"""Format sizes and counts for people; everywhere else sizes are integers in bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A unit of sizes: its symbol and its bytes."""

    name: str
    size: int

    def of(self, size: int) -> str:
        """Return bytes in this unit in five characters, for anything below 100,000 of it."""
        return str(size) if self is _BYTE else _digits(size / self.size)


_UNITS = (Unit("TiB", 1024**4), Unit("GiB", 1024**3), Unit("MiB", 1024**2), Unit("KiB", 1024))
_BYTE = Unit("B", 1)


def unit_for(size: int) -> Unit:
    """Return the largest unit that is not larger than ``size``."""
    return next((unit for unit in _UNITS if abs(size) >= unit.size), _BYTE)


def sized(size: int) -> str:
    """Return bytes in a suitable unit, e.g. ``20.53 MiB``."""
    unit = unit_for(size)
    return f"{'-' if size < 0 else ''}{unit.of(abs(size))} {unit.name}"


def brief(size: int) -> str:
    """Return bytes in a suitable unit in five characters, e.g. ``20.5M``, for a narrow column."""
    unit = unit_for(size)
    return str(size) if unit is _BYTE else f"{_digits(size / unit.size, 3)}{unit.name[0]}"


def counted(count: int, noun: str) -> str:
    """Return a number of things, e.g. ``1 phase`` or ``1,024 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _digits(amount: float, figures: int = 4) -> str:
    """Return a number with this many significant figures, or as an integer if it has more."""
    texts = (f"{amount:.{decimals}f}" for decimals in range(figures - 1, 0, -1))
    return next((text for text in texts if len(text) <= figures + 1), f"{amount:.0f}")
