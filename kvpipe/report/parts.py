"""The pieces that pages are made of: the frame, tables, charts with their legends."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvpipe.report.chart import NARROW, WIDE
from kvpipe.report.drawing import Drawing, as_svg
from kvpipe.report.legend import Key
from kvpipe.report.markup import Markup, Node, element, joined
from kvpipe.report.style import page_css

NONE = "–"
# No script, and nothing from elsewhere, whatever a text in the records says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Drawable(Protocol):
    """A chart, for any width."""

    def drawn(self, width: float) -> Drawing:
        """Return it as a drawing of this width."""
        ...


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: its anchor.
        title: its heading.
        content: what stands below the heading.
    """

    key: str
    title: str
    content: Sequence[Node]


def page(title: str, header: Node, sections: Sequence[Section], footer: str) -> str:
    """Return a whole page: one file that needs nothing else.

    Args:
        title: what the browser's tab shows.
        header: heading and verdict.
        sections: the parts, in order; the navigation lists them.
        footer: the last line.
    """
    links = [
        element("li", element("a", section.title, href=f"#{section.key}")) for section in sections
    ]
    body = element(
        "body",
        element("a", "To the content", class_="skip", href="#content"),
        element(
            "div",
            element(
                "header",
                header,
                element("nav", element("ul", links), aria_label="Sections"),
            ),
            element("main", [_section(section) for section in sections], id="content"),
            element("footer", footer),
            class_="page",
        ),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        Markup(f"<style>{page_css()}</style>"),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(section: Section) -> Markup:
    heading = f"{section.key}-heading"
    return element(
        "section",
        element("h2", section.title, id=heading),
        section.content,
        id=section.key,
        aria_labelledby=heading,
    )


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        content: what stands in it.
        note: a second, quiet line.
        class_: its CSS class.
    """

    content: Node
    note: str = ""
    class_: str | None = None


def named(text: str) -> Markup:
    """Return a name as code."""
    return element("code", breakable(text))


def breakable(text: str) -> Markup:
    """Return a text whose names may be broken after their own marks."""
    pieces = re.split(r"(?<=[_/.:])(?=.)", text)
    return Markup(element("wbr").join(joined([piece]) for piece in pieces))


def number(value: int | None, note: str = "") -> Cell:
    """Return the cell of an exact number; of None an empty one."""
    return Cell(NONE if value is None else f"{value:,}", note, "number")


def table(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    numbers: Sequence[str] = (),
) -> Markup:
    """Return a table that scrolls by itself where it is too wide.

    Args:
        name: what it shows; screen readers say it.
        columns: the headings.
        rows: the cells; the first of each row is its heading.
        numbers: the columns that hold numbers.
    """
    head = [
        element("th", column, scope="col", class_="number" if column in numbers else None)
        for column in columns
    ]
    body = [element("tr", _first(row[0]), [_cell(cell) for cell in row[1:]]) for row in rows]
    whole = element(
        "table", element("thead", element("tr", head)), element("tbody", body), class_="sticky"
    )
    # A region that scrolls has to be reachable with the keyboard.
    return element(
        "div", whole, class_="scroll", role="region", aria_label=f"Table: {name}", tabindex=0
    )


def _first(cell: str | Cell) -> Markup:
    given = cell if isinstance(cell, Cell) else Cell(cell)
    return element("th", given.content, _note(given), scope="row", class_=given.class_)


def _cell(cell: str | Cell) -> Markup:
    given = cell if isinstance(cell, Cell) else Cell(cell)
    return element("td", given.content, _note(given), class_=given.class_)


def _note(cell: Cell) -> Sequence[Markup]:
    return [element("small", cell.note)] if cell.note else []


def figure(chart: Drawable, name: str, keys: Sequence[Key], caption: Node) -> Markup:
    """Return a chart with its legend, once for wide windows and once for narrow ones."""
    entries = [
        element("li", element("span", class_=f"key {key.role} {key.form}".rstrip()), key.text)
        for key in keys
    ]
    legend = [element("ul", entries, class_="legend", aria_label="Legend")] if entries else []
    return element(
        "figure",
        legend,
        both_widths(chart, name),
        element("figcaption", caption),
    )


def both_widths(chart: Drawable, name: str) -> Markup:
    """Return the SVGs of a chart for wide and for narrow windows; the page shows one."""
    return joined(
        as_svg(chart.drawn(width), f"{name}-{form}", form)
        for form, width in (("wide", WIDE), ("narrow", NARROW))
    )


def details(summary: str, *content: Node, open_: bool = False) -> Markup:
    """Return content that is folded away."""
    return element("details", element("summary", summary), content, open=open_)
