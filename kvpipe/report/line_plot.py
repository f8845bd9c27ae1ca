"""A plot of bytes over tokens: measured and planned; both axes are linear and begin at 0."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpipe.report.chart import WIDE, ticks
from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.units import sized

_TOP, _BOTTOM = 14.0, 46.0
_LEFT = 66.0
_LETTER, _SMALL = 7.0, 12.0
# Sides of the squares of measured and of planned bytes.
_MEASURED, _PLANNED = 8.0, 15.0


@dataclass(frozen=True)
class Point:
    """The bytes of a job; a line joins the planned bytes of the points of one ``series``."""

    name: str
    series: object
    tokens: int
    measured: int
    planned: int | None

    @property
    def off(self) -> int:
        """Measured minus planned bytes."""
        return 0 if self.planned is None else self.measured - self.planned

    @property
    def label(self) -> str:
        """Its bytes, and how far they are from the planned ones."""
        return sized(self.measured) + (f", {self.off:+,} B off the plan" if self.off else "")


@dataclass(frozen=True)
class LinePlot:
    """A plot of at least one point; ``axis`` is the name of the horizontal axis."""

    title: str
    description: str
    axis: str
    points: Sequence[Point]

    def drawn(self, width: float) -> Drawing:
        """Return the plot as a drawing of this width."""
        frame = _Frame(self.points, width)
        grid = _grid(frame, self.axis)
        shapes = [*grid, *_lines(frame), *_squares(frame), *_labels(frame)]
        return Drawing(width, frame.bottom + _BOTTOM, self.title, self.description, shapes)


class _Frame:
    """The axes of a plot at a width; ``falling`` are its points, the one with the most tokens first."""

    def __init__(self, points: Sequence[Point], width: float) -> None:
        self.points = points
        self.falling = sorted(points, key=lambda point: point.tokens, reverse=True)
        self.most_bytes = max(1, *(max(point.measured, point.planned or 0) for point in points))
        self.narrow = width <= WIDE / 2
        self.right = width - 34
        self.bottom = _TOP + (240.0 if self.narrow else 340.0)

    def x(self, tokens: float) -> float:
        return _LEFT + (self.right - _LEFT) * tokens / max(self.falling[0].tokens, 1)

    def y(self, size: float) -> float:
        return self.bottom - (self.bottom - _TOP) * size / self.most_bytes


def _grid(frame: _Frame, axis: str) -> Iterator[Shape]:
    for size, label in ticks(frame.most_bytes, most_ticks=4 if frame.narrow else 6):
        y = frame.y(size)
        yield Line(_LEFT, y, frame.right, y, "grid")
        yield Text(_LEFT - 8, y + 4, label, "quiet", "end", _SMALL)
    free = frame.right + 99
    # The largest first: of values close together the smaller ones get no number.
    for tokens in dict.fromkeys(point.tokens for point in frame.falling):
        x, label = frame.x(tokens), f"{tokens:,}"
        yield Line(x, frame.bottom, x, frame.bottom + 5, "grid")
        half = _LETTER * len(label) / 2
        if x + half < free:
            yield Text(x, frame.bottom + 19, label, "quiet", "middle", _SMALL)
            free = x - half - 8
    yield Text(frame.right, frame.bottom + 38, axis, "quiet", "end", _SMALL)


def _lines(frame: _Frame) -> Iterator[Shape]:
    """Yield the lines through the planned bytes of each series."""
    last: dict[object, tuple[float, float]] = {}
    for point in frame.falling:
        if point.planned is not None:
            at = (frame.x(point.tokens), frame.y(point.planned))
            if point.series in last:
                yield Line(*last[point.series], *at, "peak")
            last[point.series] = at


def _squares(frame: _Frame) -> Iterator[Shape]:
    for point in frame.points:
        both = (("planned", point.planned, _PLANNED), ("measured", point.measured, _MEASURED))
        for what, size, side in both:
            if size is not None:
                x, y = frame.x(point.tokens) - side / 2, frame.y(size) - side / 2
                tip = f"{point.name}: {what} {size:,} bytes"
                yield Rect(x, y, side, side, "pool-kv", what == "planned", tip)


def _labels(frame: _Frame) -> Iterator[Shape]:
    """Yield the bytes of each point, below the line or, at the right, above it, where they fit."""
    taken: list[tuple[float, float, float]] = []
    for point in frame.falling:
        wide = _LETTER * len(point.label)
        x, y = frame.x(point.tokens), frame.y(point.measured)
        below = x + 12 + wide < frame.right + 30
        left, base = (x + 12, y + 15) if below else (x - 12 - wide, y - 1)
        clear = all(
            left > end or left + wide < start or abs(base - at) > 15 for start, end, at in taken
        )
        # A job that is off its plan has its label whatever that covers.
        if point.off or (clear and base < frame.bottom - 2):
            taken.append((left, left + wide, base))
            anchor, at = ("start", left) if below else ("end", left + wide)
            yield Text(at, base, point.label, "bad" if point.off else "quiet", anchor, _SMALL)
