"""The section of a report with the outputs: their hashes, their texts, and where they differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvpipe.records import PhaseRecord
from kvpipe.report.markup import Markup, Node, element
from kvpipe.report.parts import Cell, Section, details, named, number, table
from kvpipe.report.run import Run
from kvpipe.report.tokens import Omitted, Stretch, first_difference, shortened, stretches

_SHORT_TEXT = 600


def texts_section(run: Run) -> list[Section]:
    """Return the section with the outputs of a run; none for a run without any."""
    outputs = [phase for phase in run.phases if "token_ids" in phase.fields]
    if not outputs:
        return []
    first = outputs[0]
    columns = [
        "phase",
        "tokens",
        "of the prompt",
        "cached",
        "beside the first",
        "SHA-256 of the text",
    ]
    rows = [_row(phase, first) for phase in outputs]
    content: list[Node] = [
        table("Outputs", columns, rows, numbers=columns[1:4]),
        element("h3", "Prompt"),
        element("p", element("code", first.fields["prompt_sha256"])),
        _text(first.fields["prompt"], "The prompt"),
    ]
    shown: set[str] = set()
    for phase in outputs:
        if phase.fields["text_sha256"] not in shown:
            shown.add(phase.fields["text_sha256"])
            content += _output(phase, first)
    return [Section("texts", "Texts", content)]


def difference(before: Sequence[int], after: Sequence[int], names: tuple[str, str]) -> Markup:
    """Return the token ids of two outputs around where they differ.

    Args:
        before: token ids of the one output.
        after: of the other.
        names: what the outputs are called.
    """
    pieces = [_piece(piece) for piece in shortened(stretches(before, after))]
    told = f"Token ids; crossed out: only in {names[0]}; underlined: only in {names[1]}."
    return element(
        "div",
        element("p", told, class_="quiet"),
        element("p", _spaced(pieces), class_="tokens mono"),
    )


def _output(phase: PhaseRecord, first: PhaseRecord) -> Iterator[Node]:
    fields = phase.fields
    yield element("h3", phase.phase)
    if phase is not first and _comparable(fields, first.fields):
        before, after = first.fields["token_ids"], fields["token_ids"]
        if first_difference(before, after) is not None:
            yield difference(before, after, (first.phase, phase.phase))
    yield _text(fields["text"], f"The text of {phase.phase}")


def _row(phase: PhaseRecord, first: PhaseRecord) -> list[str | Cell]:
    fields = phase.fields
    return [
        Cell(named(phase.phase)),
        number(len(fields["token_ids"])),
        number(fields.get("prompt_tokens")),
        number(fields.get("cached_tokens")),
        _beside(phase, first),
        Cell(element("code", fields["text_sha256"]), class_="values"),
    ]


def _beside(phase: PhaseRecord, first: PhaseRecord) -> Cell:
    if phase is first:
        return Cell("the first")
    if not _comparable(phase.fields, first.fields):
        return Cell("another prompt")
    at = first_difference(first.fields["token_ids"], phase.fields["token_ids"])
    if at is None:
        return Cell("the same token ids", class_="good-text")
    return Cell(f"differs from token {at}", class_="bad-text")


def _comparable(fields: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether two outputs come from the same prompt."""
    return fields["prompt_sha256"] == others["prompt_sha256"]


def _text(text: str, name: str) -> Markup:
    block = element("pre", text, class_="text")
    if len(text) <= _SHORT_TEXT:
        return block
    return details(f"{name}, {len(text):,} characters", block)


def _piece(piece: Stretch | Omitted) -> Sequence[Node]:
    if isinstance(piece, Omitted):
        return [element("span", f"… {piece.count} the same …", class_="quiet")]
    if piece.same:
        return [" ".join(map(str, piece.before))]
    return _spaced(
        [
            [element(tag, " ".join(map(str, ids)))]
            for tag, ids in (("del", piece.before), ("ins", piece.after))
            if ids
        ]
    )


def _spaced(pieces: Sequence[Sequence[Node]]) -> list[Node]:
    return [node for piece in pieces for node in (*piece, " ")]
