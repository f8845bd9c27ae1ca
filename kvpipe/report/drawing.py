"""A drawing as a list of shapes in pixels; the role of each is a key of the palette.

A chart is drawn once: ``templates/drawing.svg.j2`` writes the shapes as SVG,
:mod:`kvpipe.report.png` paints them as PNG.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Rect:
    """A rectangle; ``faded`` makes it pale, as planned bytes are, ``tip`` is its tooltip."""

    tag: ClassVar[str] = "rect"
    x: float
    y: float
    width: float
    height: float
    role: str
    faded: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A straight line between two points."""

    tag: ClassVar[str] = "line"
    x1: float
    y1: float
    x2: float
    y2: float
    role: str
    width: float = 1.0


@dataclass(frozen=True)
class Text:
    """A line of text; its ``anchor`` (``start``, ``middle``, ``end``) is at x on the baseline y."""

    tag: ClassVar[str] = "text"
    x: float
    y: float
    text: str
    role: str
    anchor: str = "start"
    size: float = 13.0


Shape = Rect | Line | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes, the lowest first, and a title and a description for people who cannot see them."""

    width: float
    height: float
    title: str
    description: str
    shapes: Sequence[Shape]
