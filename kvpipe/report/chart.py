"""A chart of horizontal bars: a row for each phase, time going down, bytes to the right.

Rows read like the table beside them and keep their names legible on a phone, where columns would
turn them sideways. A run of hundreds of phases is drawn with thin rows and a name for each cycle.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.units import sized, unit_for

WIDE, NARROW = 1000, 358
# More rows than this are drawn thin.
_MOST_FULL_ROWS = 48
_LETTER = 7.1
_SMALL = 12.0
_SMALL_LETTER = 7.44
_AXIS_HEIGHT = 22
# A peak beyond this many times the bar's end is written out.
_FAR = 1.01
# Heights of bars.
_FULL, _THIN, _DENSE = 13.0, 4.0, 5.0
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Part:
    """A piece of a bar.

    Attributes:
        name: what it holds.
        role: its colour.
        size: its bytes.
    """

    name: str
    role: str
    size: int


@dataclass(frozen=True)
class Bar:
    """Pieces one after the other.

    Attributes:
        parts: the pieces.
        name: what the bar shows, e.g. ``planned``.
        thin: whether it is drawn thin, pale and without its value.
        peak: the most bytes that were held inside the phase; None if it is not known.
        lettered: whether its name stands before its value, where a row has several full bars.
    """

    parts: Sequence[Part]
    name: str
    thin: bool = False
    peak: int | None = None
    lettered: bool = False

    @property
    def total(self) -> int:
        """The bytes of all pieces."""
        return sum(part.size for part in self.parts)

    @property
    def value(self) -> str:
        """What is written after it; in brackets its peak, if that is far beyond its end."""
        name = f"{self.name} " if self.lettered else ""
        peak = f" ({sized(self.end)})" if self.end > _FAR * self.total > 0 else ""
        return f"{name}{sized(self.total)}{peak}"

    @property
    def end(self) -> int:
        """The bytes that it reaches, its peak included."""
        return max(self.total, self.peak or 0)


@dataclass(frozen=True)
class Row:
    """The bars of a phase.

    Attributes:
        label: name of the phase.
        bars: its bars, the uppermost first.
        role: how the label is written: ``ink``, ``quiet`` or ``bad``.
        group: rows of the same group get one name where rows are thin.
    """

    label: str
    bars: Sequence[Bar]
    role: str = "ink"
    group: str = ""


@dataclass(frozen=True)
class Chart:
    """What a chart shows, for any width.

    Attributes:
        title: what it shows, in a few words.
        description: what one can see in it, for those who cannot.
        rows: a row for each phase.
        limit: bytes that there are; drawn where it is not far beyond the bars. None without one.
    """

    title: str
    description: str
    rows: Sequence[Row]
    limit: int | None = None

    @property
    def dense(self) -> bool:
        """Whether it has so many rows that they are drawn thin."""
        return len(self.rows) > _MOST_FULL_ROWS

    def drawn(self, width: float) -> Drawing:
        """Return the chart as a drawing of this width."""
        layout = _Layout.of(self, width)
        shapes, height = _drawn_rows(self, layout)
        grid = _grid(self, layout, height)
        return Drawing(width, height, self.title, self.description, [*grid, *shapes])


@dataclass(frozen=True)
class _Layout:
    """Where things are.

    Attributes:
        width: of the whole drawing.
        left, right: where the bars begin, and where the longest ends.
        most: bytes at ``right``.
        above: whether labels stand above their bars, not left of them.
        dense: whether rows are thin.
    """

    width: float
    left: float
    right: float
    most: int
    above: bool
    dense: bool

    @classmethod
    def of(cls, chart: Chart, width: float) -> "_Layout":
        most = max((bar.end for row in chart.rows for bar in row.bars), default=0)
        if chart.limit is not None and chart.limit <= 1.6 * most:
            most = max(most, chart.limit)
        dense = chart.dense
        above = width < (WIDE + NARROW) / 2
        names = [row.group if dense else row.label for row in chart.rows]
        longest = max((len(name) for name in names), default=0)
        left = 0.0 if above and not dense else min(0.34 * width, _LETTER * longest + 14)
        values = [bar.value for row in chart.rows for bar in row.bars if not bar.thin]
        room = 10 + _SMALL_LETTER * max(map(len, values), default=0)
        return cls(width, left, width - room, max(most, 1), above and not dense, dense)

    def x(self, size: float) -> float:
        """Return where ``size`` bytes end."""
        return self.left + (self.right - self.left) * size / self.most


def _drawn_rows(chart: Chart, layout: _Layout) -> tuple[list[Shape], float]:
    """Return the rows, and the height at which they end."""
    if layout.dense:
        return _dense_rows(chart, layout)
    shapes: list[Shape] = []
    y = float(_AXIS_HEIGHT)
    for row in chart.rows:
        if layout.above:
            shapes.append(Text(0, y + 13, row.label, row.role))
            y += 19
        else:
            shapes.append(Text(0, y + 11.5, _cut(row.label, layout), row.role))
        top = y
        for bar in row.bars:
            height = _THIN if bar.thin else _FULL
            # A thin bar alone stands where a full one has its middle.
            at = y if len(row.bars) > 1 or not bar.thin else y + (_FULL - _THIN) / 2
            shapes += _bar(bar, row.label, at, height, layout)
            if not bar.thin:
                end = layout.x(bar.end) + 6
                shapes.append(Text(end, y + height - 2.5, bar.value, "quiet", size=_SMALL))
            y += height + 2
        y = max(y, top + _FULL + 2) + 8
    return shapes, y


def _dense_rows(chart: Chart, layout: _Layout) -> tuple[list[Shape], float]:
    """Return rows without gaps, planned bars only where nothing was measured, and their end."""
    shapes: list[Shape] = []
    y = float(_AXIS_HEIGHT)
    group, named_until = "", 0.0
    for row in chart.rows:
        if row.group != group and y >= named_until:
            shapes.append(Text(0, y + 9, _cut(row.group, layout), row.role))
            named_until = y + 15
        group = row.group
        for bar in [bar for bar in row.bars if not bar.thin] or row.bars:
            shapes += _bar(bar, row.label, y, _DENSE, layout)
            y += _DENSE
    return shapes, y + 4


def _cut(label: str, layout: _Layout) -> str:
    """Return a label, cut off where the bars begin."""
    room = int((layout.left - 10) / _LETTER)
    return label if len(label) <= room else f"{label[: room - 1]}…"


def _bar(bar: Bar, label: str, y: float, height: float, layout: _Layout) -> Iterator[Shape]:
    held = 0
    for part in bar.parts:
        x, held = layout.x(held), held + part.size
        tip = f"{label}, {bar.name}: {part.name} {part.size:,} bytes ({sized(part.size)})"
        yield Rect(x, y, layout.x(held) - x, height, part.role, faded=bar.thin, tip=tip)
    if bar.peak is not None and bar.peak > held:
        middle, end = y + height / 2, layout.x(bar.peak)
        cap = min(4.0, height / 2)
        if not layout.dense:
            yield Line(layout.x(held), middle, end, middle, "peak", 1.5)
        yield Line(end, middle - cap, end, middle + cap, "peak", 1.5)


def _grid(chart: Chart, layout: _Layout, height: float) -> Iterator[Shape]:
    for size, label in ticks(layout.most, most_ticks=3 if layout.width < WIDE / 2 else 6):
        x = layout.x(size)
        yield Line(x, _AXIS_HEIGHT - 6, x, height, "grid")
        anchor = "start" if size == 0 else "middle"
        yield Text(x, _AXIS_HEIGHT - 10, label, "quiet", anchor, _SMALL)
    if chart.limit is not None and chart.limit <= layout.most:
        x = layout.x(chart.limit)
        yield Line(x, _AXIS_HEIGHT - 6, x, height, "limit", 1.5)


def ticks(most: int, most_ticks: int) -> Iterator[tuple[float, str]]:
    """Yield round amounts from 0 to ``most`` bytes, with their labels.

    Args:
        most: the largest amount, at least 1.
        most_ticks: how many there may be, 0 left aside.
    """
    unit = unit_for(most)
    amount = most / unit.size
    power = 10.0 ** math.floor(math.log10(amount / most_ticks))
    step = next(
        power * factor for factor in (*_STEPS, 20) if amount / (power * factor) <= most_ticks
    )
    for index in range(int(amount / step) + 1):
        value = index * step
        yield value * unit.size, f"{value:g} {unit.name}" if value else "0"
