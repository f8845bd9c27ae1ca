"""The phases as tables for a terminal."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvpipe.pipeline.description import PhaseDoc
from kvpipe.report.phases import default_of, effect_rows

_INDENT = (0, 0, 0, 2)


def print_phases(phases: Sequence[PhaseDoc], out: TextIO) -> None:
    """Print each phase: what it does, its options, what it needs and leaves.

    Args:
        phases: the phases.
        out: the stream.
    """
    console = Console(file=out)
    for phase in phases:
        console.print(Text.assemble((phase.name, "bold"), f"  {phase.summary}"))
        if phase.options:
            console.print(Padding(_options(phase), _INDENT))
        console.print(Padding(_effect(phase), _INDENT))
        console.print()


def _options(phase: PhaseDoc) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("option", "type", "default"):
        table.add_column(heading, no_wrap=True)
    table.add_column("meaning", ratio=1)
    for option in phase.options:
        meaning = option.meaning.replace("``", "")
        table.add_row(*map(Text, (option.name, option.type, default_of(option), meaning)))
    return table


def _effect(phase: PhaseDoc) -> Table:
    rows = effect_rows(phase.effect) | {"runs in": f"the {phase.runs_in}"}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1)
    for heading, words in rows.items():
        table.add_row(Text(heading), Text(words))
    return table
