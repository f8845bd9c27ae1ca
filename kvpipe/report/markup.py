"""HTML without a template engine: elements as values, every text escaped."""

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Node = str | Iterable["Node"]

_VOID = {"meta", "br", "hr", "wbr"}


def element(tag: str, *children: Node, **attributes: str | int | bool | None) -> Markup:
    """Return an element.

    Args:
        tag: its name.
        children: texts, which are escaped, and elements, which are not.
        attributes: None and False leave one out, True has no value. A trailing underscore is for
            Python's own words (``class_``), others become hyphens (``aria_label``).
    """
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Markup(f"<{tag}{given}>")
    return Markup(f"<{tag}{given}>{joined(children)}</{tag}>")


def joined(nodes: Iterable[Node]) -> Markup:
    """Return nodes one after the other as HTML."""
    return Markup("".join(_text(node) for node in nodes))


def _text(node: Node) -> str:
    if isinstance(node, Markup):
        return node
    if isinstance(node, str):
        return html.escape(node, quote=False)
    return joined(node)
