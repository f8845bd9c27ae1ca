"""A chart of horizontal bars: one row for each phase, from top to bottom, bytes to the right.

Rows match the table beside them, and their names stay legible on a phone. A run of hundreds of
phases is *dense*: thin rows, with a name for each cycle only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.units import sized, unit_for

WIDE, NARROW = 1000, 358
_MOST_FULL_ROWS = 48
_LETTER = 7.1
_SMALL = 12.0
_SMALL_LETTER = 7.44
_AXIS_HEIGHT = 22
# A peak beyond this many times the bar's end is written out.
_FAR = 1.01
# Heights of bars.
_FULL, _THIN, _DENSE = 13.0, 4.0, 5.0
_STEPS = (1, 2, 2.5, 5, 10, 20)


@dataclass(frozen=True)
class Part:
    """A piece of a bar: its name, its role in the palette, its bytes."""

    name: str
    role: str
    size: int


@dataclass(frozen=True)
class Bar:
    """Pieces side by side, and a whisker to the ``peak`` inside the phase if that is known.

    A ``thin`` bar is pale and has no value; a ``lettered`` one has its name before its value.
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
        """The label after the bar; in brackets its peak, if that is far beyond its end."""
        name = f"{self.name} " if self.lettered else ""
        peak = f" ({sized(self.end)})" if self.end > _FAR * self.total > 0 else ""
        return f"{name}{sized(self.total)}{peak}"

    @property
    def end(self) -> int:
        """The bytes that it reaches, its peak included."""
        return max(self.total, self.peak or 0)


@dataclass(frozen=True)
class Row:
    """The bars of a phase, its label and the label's role.

    A dense chart writes ``group`` once for all rows that share it.
    """

    label: str
    bars: Sequence[Bar]
    role: str = "ink"
    group: str = ""


@dataclass(frozen=True)
class Chart:
    """A row for each phase; the capacity ``limit`` is drawn if it is not far beyond the bars."""

    title: str
    description: str
    rows: Sequence[Row]
    limit: int | None = None

    @property
    def dense(self) -> bool:
        """Whether it has too many rows for bars of the usual height."""
        return len(self.rows) > _MOST_FULL_ROWS

    def drawn(self, width: float) -> Drawing:
        """Return the chart as a drawing of this width."""
        layout = _Layout(self, width)
        shapes, height = _dense_rows(layout) if self.dense else _full_rows(layout)
        shapes = [*_grid(layout, height), *shapes]
        return Drawing(width, height, self.title, self.description, shapes)


class _Layout:
    """The scale of a chart at a width.

    The bars begin at ``left``, and the longest, of ``most`` bytes, ends at ``right``, before its
    value. Labels are ``above`` their bars, or to the left.
    """

    def __init__(self, chart: Chart, width: float) -> None:
        bars = [bar for row in chart.rows for bar in row.bars]
        most, limit = max((bar.end for bar in bars), default=0), chart.limit or 0
        labels = [len(row.group if chart.dense else row.label) for row in chart.rows]
        values = [len(bar.value) for bar in bars if not bar.thin]
        self.chart, self.width = chart, width
        self.most = max(most, limit if limit <= 1.6 * most else 0, 1)
        self.above = width < (WIDE + NARROW) / 2 and not chart.dense
        self.left = 0.0 if self.above else min(0.34 * width, _LETTER * max(labels, default=0) + 14)
        self.right = width - 10 - _SMALL_LETTER * max(values, default=0)

    def x(self, size: float) -> float:
        """Return the place of ``size`` bytes."""
        return self.left + (self.right - self.left) * size / self.most

    def cut(self, label: str) -> str:
        """Return a label, cut off before the bars."""
        room = int((self.left - 10) / _LETTER)
        return label if len(label) <= room else f"{label[: room - 1]}…"


def _full_rows(layout: _Layout) -> tuple[list[Shape], float]:
    """Return the rows, and the height at which they end."""
    shapes: list[Shape] = []
    y = float(_AXIS_HEIGHT)
    for row in layout.chart.rows:
        if layout.above:
            shapes.append(Text(0, y + 13, row.label, row.role))
            y += 19
        else:
            shapes.append(Text(0, y + 11.5, layout.cut(row.label), row.role))
        top = y
        for bar in row.bars:
            height = _THIN if bar.thin else _FULL
            # A thin bar alone is centred in the row.
            at = y if len(row.bars) > 1 or not bar.thin else y + (_FULL - _THIN) / 2
            shapes += _bar(bar, row.label, at, height, layout)
            if not bar.thin:
                end = layout.x(bar.end) + 6
                shapes.append(Text(end, y + height - 2.5, bar.value, "quiet", size=_SMALL))
            y += height + 2
        y = max(y, top + _FULL + 2) + 8
    return shapes, y


def _dense_rows(layout: _Layout) -> tuple[list[Shape], float]:
    """Return rows without gaps, planned bars only where nothing was measured, and their end."""
    shapes: list[Shape] = []
    y = float(_AXIS_HEIGHT)
    group, named_until = "", 0.0
    for row in layout.chart.rows:
        if row.group != group and y >= named_until:
            shapes.append(Text(0, y + 9, layout.cut(row.group), row.role))
            named_until = y + 15
        group = row.group
        for bar in [bar for bar in row.bars if not bar.thin] or row.bars:
            shapes += _bar(bar, row.label, y, _DENSE, layout)
            y += _DENSE
    return shapes, y + 4


def _bar(bar: Bar, label: str, y: float, height: float, layout: _Layout) -> Iterator[Shape]:
    held = 0
    for part in bar.parts:
        x, held = layout.x(held), held + part.size
        tip = f"{label}, {bar.name}: {part.name} {part.size:,} bytes ({sized(part.size)})"
        yield Rect(x, y, layout.x(held) - x, height, part.role, faded=bar.thin, tip=tip)
    if bar.peak is not None and bar.peak > held:
        middle, end = y + height / 2, layout.x(bar.peak)
        cap = min(4.0, height / 2)
        if not layout.chart.dense:
            yield Line(layout.x(held), middle, end, middle, "peak", 1.5)
        yield Line(end, middle - cap, end, middle + cap, "peak", 1.5)


def _grid(layout: _Layout, height: float) -> Iterator[Shape]:
    for size, label in ticks(layout.most, most_ticks=3 if layout.width < WIDE / 2 else 6):
        x = layout.x(size)
        yield Line(x, _AXIS_HEIGHT - 6, x, height, "grid")
        anchor = "start" if size == 0 else "middle"
        yield Text(x, _AXIS_HEIGHT - 10, label, "quiet", anchor, _SMALL)
    limit = layout.chart.limit
    if limit is not None and limit <= layout.most:
        yield Line(layout.x(limit), _AXIS_HEIGHT - 6, layout.x(limit), height, "limit", 1.5)


def ticks(most: int, most_ticks: int) -> Iterator[tuple[float, str]]:
    """Yield round amounts from 0 to ``most`` bytes, at least 1, with their labels.

    ``most_ticks`` is the largest number of ticks, without that of 0.
    """
    unit = unit_for(most)
    amount = most / unit.size
    power = 10.0 ** math.floor(math.log10(amount / most_ticks))
    step = next(power * factor for factor in _STEPS if amount / (power * factor) <= most_ticks)
    for index in range(int(amount / step) + 1):
        value = index * step
        yield value * unit.size, f"{value:g} {unit.name}" if value else "0"
