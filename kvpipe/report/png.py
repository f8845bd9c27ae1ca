"""A drawing as PNG.

Pillow paints it: the engine brings Pillow along, and its wheel holds a font and every library that
it needs, so it works on a machine with neither. It is imported here, when a picture is made.
"""

import io
from functools import cache
from typing import TYPE_CHECKING

from kvpipe.report.drawing import Drawing, Line, Rect, Shape, Text
from kvpipe.report.palette import FADED, LIGHT

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

SCALE = 2
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def as_png(drawing: Drawing) -> bytes:
    """Return the drawing as a PNG of twice its size, on a light ground."""
    from PIL import Image, ImageDraw

    size = (round(drawing.width * SCALE), round(drawing.height * SCALE))
    image = Image.new("RGB", size, LIGHT["ground"])
    canvas = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        _paint(canvas, shape)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _paint(canvas: "ImageDraw.ImageDraw", shape: Shape) -> None:
    match shape:
        case Rect():
            x, y = round(shape.x * SCALE), round(shape.y * SCALE)
            right, low = round((shape.x + shape.width) * SCALE), y + round(shape.height * SCALE)
            # The far edges belong to what Pillow fills; less than a pixel has none.
            if right > x and low > y:
                colour = _paler(LIGHT[shape.role]) if shape.faded else LIGHT[shape.role]
                canvas.rectangle((x, y, right - 1, low - 1), fill=colour)
        case Line():
            ends = (shape.x1 * SCALE, shape.y1 * SCALE, shape.x2 * SCALE, shape.y2 * SCALE)
            canvas.line(ends, fill=LIGHT[shape.role], width=round(shape.width * SCALE))
        case Text():
            canvas.text(
                (shape.x * SCALE, shape.y * SCALE),
                shape.text,
                fill=LIGHT[shape.role],
                font=_font(shape.size * SCALE),
                anchor=_ANCHORS[shape.anchor],
                # A rim of the ground, so that grid lines do not run through the letters.
                stroke_width=SCALE,
                stroke_fill=LIGHT["ground"],
            )


@cache
def _font(size: float) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _paler(colour: str) -> str:
    """Return a colour as it looks when the ground shines through."""
    channels = zip(_rgb(colour), _rgb(LIGHT["ground"]), strict=True)
    mixed = [round(FADED * own + (1 - FADED) * ground) for own, ground in channels]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
