"""A plot of bytes over tokens: what was measured, what was planned, and the line through them.

Both axes are linear and begin at 0, because only so the line that is claimed looks like one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvpipe.report.chart import WIDE, ticks
from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.units import sized

_TOP, _BOTTOM = 14.0, 46.0
_LETTER, _SMALL = 7.0, 12.0
# Sides of the squares that stand for measured and for planned bytes.
_MEASURED, _PLANNED = 8.0, 15.0


@dataclass(frozen=True)
class Point:
    """A job.

    Attributes:
        name: what it is called.
        tokens: its place on the horizontal axis.
        measured: bytes that were measured.
        planned: bytes that were planned; None if they are not known.
        off: bytes that it is off its line; None if it is on it.
    """

    name: str
    tokens: int
    measured: int
    planned: int | None
    off: int | str | None = None


@dataclass(frozen=True)
class LinePlot:
    """What a plot shows, for any width.

    Attributes:
        title: what it shows, in a few words.
        description: what one can see in it, for those who cannot.
        axis: name of the horizontal axis.
        points: the jobs, at least one.
        lines: slope and intercept of each line.
    """

    title: str
    description: str
    axis: str
    points: Sequence[Point]
    lines: Sequence[tuple[Fraction, Fraction]]

    def drawn(self, width: float) -> Drawing:
        """Return the plot as a drawing of this width."""
        frame = _Frame.of(self, width)
        shapes = [
            *_grid(self, frame),
            *_lines(self, frame),
            *_points(self, frame),
            *_labels(self, frame),
        ]
        return Drawing(width, frame.bottom + _BOTTOM, self.title, self.description, shapes)


@dataclass(frozen=True)
class _Frame:
    """Where the axes are, and what they reach to."""

    left: float
    right: float
    bottom: float
    most_tokens: int
    most_bytes: int

    @classmethod
    def of(cls, plot: LinePlot, width: float) -> "_Frame":
        sizes = [max(point.measured, point.planned or 0) for point in plot.points]
        return cls(
            left=66.0,
            right=width - 34,
            bottom=_TOP + (340.0 if width > WIDE / 2 else 240.0),
            most_tokens=max(max(point.tokens for point in plot.points), 1),
            most_bytes=max(*sizes, 1),
        )

    def x(self, tokens: float) -> float:
        return self.left + (self.right - self.left) * tokens / self.most_tokens

    def y(self, size: float) -> float:
        return self.bottom - (self.bottom - _TOP) * size / self.most_bytes

    @property
    def narrow(self) -> bool:
        return self.right < WIDE / 2


def _grid(plot: LinePlot, frame: _Frame) -> Iterator[Shape]:
    for size, label in ticks(frame.most_bytes, most_ticks=4 if frame.narrow else 6):
        y = frame.y(size)
        yield Line(frame.left, y, frame.right, y, "grid")
        yield Text(frame.left - 8, y + 4, label, "quiet", "end", _SMALL)
    free = frame.right + 99
    # The largest first: where values stand close together, the smaller ones go without a number.
    for tokens in sorted({point.tokens for point in plot.points}, reverse=True):
        x, label = frame.x(tokens), f"{tokens:,}"
        yield Line(x, frame.bottom, x, frame.bottom + 5, "grid")
        half = _LETTER * len(label) / 2
        if x + half < free:
            yield Text(x, frame.bottom + 19, label, "quiet", "middle", _SMALL)
            free = x - half - 8
    yield Text(frame.right, frame.bottom + 38, plot.axis, "quiet", "end", _SMALL)


def _lines(plot: LinePlot, frame: _Frame) -> Iterator[Shape]:
    for slope, intercept in plot.lines:
        last = float(slope * frame.most_tokens + intercept)
        yield Line(
            frame.x(0), frame.y(float(intercept)), frame.x(frame.most_tokens), frame.y(last), "peak"
        )


def _points(plot: LinePlot, frame: _Frame) -> Iterator[Shape]:
    for point in plot.points:
        if point.planned is not None:
            tip = f"{point.name}: planned {point.planned:,} bytes"
            yield _square(frame, point.tokens, point.planned, _PLANNED, tip, faded=True)
        tip = f"{point.name}: measured {point.measured:,} bytes"
        yield _square(frame, point.tokens, point.measured, _MEASURED, tip)


def _square(
    frame: _Frame, tokens: int, size: int, side: float, tip: str, faded: bool = False
) -> Rect:
    x, y = frame.x(tokens) - side / 2, frame.y(size) - side / 2
    return Rect(x, y, side, side, "pool-kv", faded, tip)


def _labels(plot: LinePlot, frame: _Frame) -> Iterator[Shape]:
    """Yield the bytes of each point, below the line or, at the right, above it, where they fit."""
    taken: list[tuple[float, float, float]] = []
    for point in sorted(plot.points, key=lambda point: point.tokens, reverse=True):
        off = "" if point.off is None else f", {_signed(point.off)} B off the line"
        label = sized(point.measured) + off
        wide = _LETTER * len(label)
        x, y = frame.x(point.tokens), frame.y(point.measured)
        below = x + 12 + wide < frame.right + 30
        left, base = (x + 12, y + 15) if below else (x - 12 - wide, y - 1)
        clear = all(
            left > end or left + wide < start or abs(base - at) > 15 for start, end, at in taken
        )
        # A job that is off the line is told whatever it covers.
        if point.off is not None or (clear and base < frame.bottom - 2):
            taken.append((left, left + wide, base))
            anchor, at = ("start", left) if below else ("end", left + wide)
            role = "quiet" if point.off is None else "bad"
            yield Text(at, base, label, role, anchor, _SMALL)


def _signed(value: int | str) -> str:
    return f"{value:+,}" if isinstance(value, int) else value
