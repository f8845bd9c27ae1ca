"""A drawing as a list of shapes, each of a role, and how it becomes SVG.

A chart is drawn once, as these shapes. The page shows them as SVG, whose colours are the page's
own; :mod:`kvpipe.report.png` paints the same shapes as a PNG.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from kvpipe.report.markup import Markup


@dataclass(frozen=True)
class Rect:
    """A rectangle; sizes are pixels at a scale of 1.

    Attributes:
        x, y, width, height: where.
        role: what it stands for, a key of the palette.
        faded: whether it is paler, as planned bytes are beside measured ones.
        tip: what a pointer over it shows; empty for nothing.
    """

    x: float
    y: float
    width: float
    height: float
    role: str
    faded: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A straight line.

    Attributes:
        x1, y1, x2, y2: its ends.
        role: what it stands for.
        width: how thick.
    """

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
        x, y: where; ``y`` is its baseline.
        text: the text.
        role: what it stands for.
        anchor: ``start``, ``middle`` or ``end``: which part of it is at ``x``.
        size: height of the letters.
    """

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
        title: what it shows, in a few words.
        description: what one can see in it, for those who cannot.
        shapes: the shapes, the lowest first.
    """

    width: float
    height: float
    title: str
    description: str
    shapes: Sequence[Shape]


def as_svg(drawing: Drawing, name: str, class_: str = "", style: str = "") -> Markup:
    """Return the drawing as an SVG element.

    Args:
        drawing: what to draw.
        name: makes the element's ids; once in a page.
        class_: its CSS class.
        style: CSS of a picture that stands alone; in a page the page has it.
    """
    known = f"{name}-title {name}-description"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{class_}" role="img" '
        f'aria-labelledby="{known}" viewBox="0 0 {_number(drawing.width)} '
        f'{_number(drawing.height)}">'
        f'<title id="{name}-title">{html.escape(drawing.title)}</title>'
        f'<desc id="{name}-description">{html.escape(drawing.description)}</desc>'
    )
    css = f"<style>{style}</style>" if style else ""
    return Markup(head + css + "".join(_svg(shape) for shape in drawing.shapes) + "</svg>")


def _svg(shape: Shape) -> str:
    match shape:
        case Rect():
            fade = " faded" if shape.faded else ""
            place = _attributes(x=shape.x, y=shape.y, width=shape.width, height=shape.height)
            tip = f"<title>{html.escape(shape.tip)}</title>" if shape.tip else ""
            return f'<rect class="{shape.role}{fade}"{place}>{tip}</rect>'
        case Line():
            place = _attributes(x1=shape.x1, y1=shape.y1, x2=shape.x2, y2=shape.y2)
            return f'<line class="{shape.role}"{place} stroke-width="{_number(shape.width)}"/>'
        case Text():
            place = _attributes(x=shape.x, y=shape.y)
            return (
                f'<text class="{shape.role}"{place} text-anchor="{shape.anchor}" '
                f'font-size="{_number(shape.size)}">{html.escape(shape.text)}</text>'
            )


def _attributes(**places: float) -> str:
    return "".join(f' {name}="{_number(value)}"' for name, value in places.items())


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
