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
    # Pillow blends only in this mode.
    canvas = ImageDraw.Draw(image, "RGBA")
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
                alpha = f"{round(255 * FADED):02x}" if shape.faded else ""
                canvas.rectangle((x, y, right - 1, low - 1), fill=LIGHT[shape.role] + alpha)
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
