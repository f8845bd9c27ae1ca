"""Tables as values: built once from records, laid out as HTML, as Markdown or at a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpipe.report.plan import markdown_table
from kvpipe.units import sized

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell: names and values set as ``codes``, then ``text``; on pages also a link and a note.

    The note is a second, quiet line; the tone is ``good``, ``bad``, ``quiet`` or empty.
    """

    text: str = ""
    codes: Sequence[str] = ()
    note: str = ""
    tone: str = ""
    href: str = ""

    @property
    def markdown(self) -> str:
        """The cell in a Markdown table."""
        quoted = ["`" + code.replace("|", "\\|").replace("`", "'") + "`" for code in self.codes]
        return " ".join(filter(None, [", ".join(quoted), self.text])) or NONE


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: its subject; screen readers say it.
        columns: the headings.
        rows: the cells; the first of each row is its heading.
        texts: number of columns, from the left, that hold texts; the others hold numbers.
        summary: the heading under which a page folds the table away; Markdown has it alone.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1
    summary: str = ""

    def markdown(self) -> Iterator[str]:
        """Yield the lines of the table in Markdown."""
        if self.summary:
            yield f"{self.summary}."
        else:
            rows = [[cell.markdown for cell in row] for row in self.rows]
            yield from markdown_table(self.columns, rows, self.texts)


def number(value: int | None, note: str = "") -> Cell:
    """Return the cell of an exact number."""
    return Cell(NONE if value is None else f"{value:,}", note=note)


def at_least(value: int | None) -> Cell:
    """Return the cell of a sampled peak; the real one may be larger."""
    return Cell(NONE if value is None else f"≥ {sized(value)}")
