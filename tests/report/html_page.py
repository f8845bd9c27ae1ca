"""Reads a page of HTML: whether it is well-formed, and its contents."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "wbr", "rect", "line"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its text.

    Raises:
        AssertionError: an element is not closed in its place, or an id occurs twice.
    """

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []
        ids = [e["id"] for e in self.elements if "id" in e]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **{k: v if v is not None else "" for k, v in attrs}}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert tag in VOID

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        """Return the elements of a tag with these attributes."""
        return [
            e
            for e in self.elements
            if e["tag"] == tag and all(e.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]

    def text_of(self, tag, **attributes):
        """Return the text of the one such element."""
        (element,) = self.all(tag, **attributes)
        return element["text"]

    def table(self, name):
        """Return the rows of the table that is so called, as texts, the heading first."""
        start = next(
            i for i, e in enumerate(self.elements) if e.get("aria-label") == f"Table: {name}"
        )
        rows = []
        for element in self.elements[start + 1 :]:
            if element.get("role") == "region" or element["tag"] == "section":
                break
            if element["tag"] == "tr":
                rows.append([])
            if element["tag"] in ("th", "td"):
                rows[-1].append(element["text"])
        return rows
