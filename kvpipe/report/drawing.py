"""A drawing as a list of shapes, each with a role for its colour.

A chart is drawn once: ``templates/drawing.svg.j2`` writes the shapes as SVG,
:mod:`kvpipe.report.png` paints them as PNG.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Rect:
    """A rectangle, in pixels at a scale of 1.

    Attributes:
        x, y, width, height: its place and size.
        role: a key of the palette.
        faded: whether it is pale, as planned bytes are beside measured ones.
        tip: the tooltip, or empty.
    """

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
    """A line of text.

    Attributes:
        x, y: the place of its anchor; ``y`` is its baseline.
        text: the text.
        role: a key of the palette.
        anchor: ``start``, ``middle`` or ``end`` of the text.
        size: height of the letters.
    """

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
    """A picture.

    Attributes:
        width, height: its size in pixels at a scale of 1.
        title: its subject, in a few words.
        description: a text for people who cannot see it.
        shapes: the shapes, the lowest first.
    """

    width: float
    height: float
    title: str
    description: str
    shapes: Sequence[Shape]


class Drawable(Protocol):
    """A chart, for any width."""

    def drawn(self, width: float) -> Drawing:
        """Return it as a drawing of this width."""
        ...
