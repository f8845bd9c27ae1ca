"""Render templates: pages, and drawings as SVG. Jinja2 is imported when one is rendered."""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpipe.report.chart import NARROW, WIDE
from kvpipe.report.drawing import Drawing
from kvpipe.report.palette import DARK, FADED, LIGHT, pool_name
from kvpipe.report.tables import NONE, at_least
from kvpipe.units import counted, sized

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
# Tables with more rows than this are folded.
_MOST_ROWS = 100
_MOST_CHARS = 80


def rendered(template: str, **values: Any) -> str:
    """Return a template, filled in; every text in ``values`` is escaped."""
    return _environment().get_template(template).render(values)


def as_svg(drawing: Drawing) -> str:
    """Return a drawing as an SVG file with its own style, for light and dark."""
    return rendered("picture.svg.j2", drawing=drawing)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "px": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
        "commas": lambda value: NONE if value is None else f"{value:,}",
        "breakable": _breakable,
        "short": _short,
        "sized": sized,
        "at_least": lambda value: at_least(value).text,
        "counted": counted,
        "pool_name": pool_name,
    }
    environment.globals |= {
        "light": LIGHT,
        "dark": DARK,
        "faded": FADED,
        "widths": {"wide": WIDE, "narrow": NARROW},
        "most_rows": _MOST_ROWS,
        "none_sign": NONE,
    }
    return environment


def _breakable(text: str) -> "Markup":
    """Return a text with a possible line break after each mark inside its names."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[_/.:])(?=.)", text))


def _short(value: object) -> str:
    """Return a value as text, cut off if it is long; the records have all of it."""
    if isinstance(value, list | tuple) and len(value) > 8:
        first = ", ".join(str(item) for item in value[:6])
        return f"[{first}, …] ({counted(len(value), 'value')})"
    text = f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}… ({len(text)} characters)"
