"""Pictures of their own: heading, legend, chart; the memory timeline of a run is one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvpipe.report.chart import WIDE
from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.report.figures import memory_chart, memory_keys
from kvpipe.report.palette import Key
from kvpipe.report.run import Run

_MARGIN = 24
_HEADING = 34
_LEGEND_ROW = 22
_LETTER = 7.4


def timeline(run: Run) -> Drawing:
    """Return the memory timeline of a run with its heading and legend."""
    return framed(memory_chart(run).drawn(WIDE), memory_keys(run))


def framed(chart: Drawing, keys: Sequence[Key]) -> Drawing:
    """Return a chart of the width :data:`WIDE` with a heading and a legend, on its own ground."""
    legend, legend_height = _legend(keys)
    top = _MARGIN + _HEADING + legend_height
    width, height = WIDE + 2 * _MARGIN, top + chart.height + _MARGIN
    heading = Text(_MARGIN, _MARGIN + 14, chart.title, "ink", size=17)
    shapes = [
        Rect(0, 0, width, height, "ground"),
        heading,
        *legend,
        *(_moved(shape, _MARGIN, top) for shape in chart.shapes),
    ]
    return Drawing(width, height, chart.title, chart.description, shapes)


def _legend(keys: Sequence[Key]) -> tuple[list[Shape], float]:
    shapes: list[Shape] = []
    x, y = float(_MARGIN), float(_MARGIN + _HEADING)
    for key in keys:
        width = 24 + _LETTER * len(key.text) + 18
        if x + width > _MARGIN + WIDE and x > _MARGIN:
            x, y = float(_MARGIN), y + _LEGEND_ROW
        shapes += _key(key, x, y)
        x += width
    return shapes, y + _LEGEND_ROW - _MARGIN - _HEADING + 6


def _key(key: Key, x: float, y: float) -> Iterator[Shape]:
    if key.form in ("line", "whisker"):
        yield Line(x, y + 6, x + 16, y + 6, key.role, 1.5)
    elif key.form == "thin":
        yield Rect(x, y + 4, 16, 4, key.role, faded=True)
    else:
        yield Rect(x, y, 16, 12, key.role, faded=key.form == "pale")
    if key.form == "whisker":
        yield Line(x + 16, y + 2, x + 16, y + 10, key.role, 1.5)
    yield Text(x + 23, y + 11, key.text, "ink")


def _moved(shape: Shape, x: float, y: float) -> Shape:
    if isinstance(shape, Line):
        return replace(shape, x1=shape.x1 + x, x2=shape.x2 + x, y1=shape.y1 + y, y2=shape.y2 + y)
    return replace(shape, x=shape.x + x, y=shape.y + y)
