"""Draw what the terminal shows of a run, from its records: the picture in README.md.

make run
.venv/bin/python docs/make_picture.py outputs/tiny/<date>/records.jsonl docs/run.svg

The table is printed by the very sink that prints it at a terminal; this file only chooses the
frame. The run directory stands in the picture, so use a run from a directory that may be shown.
"""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from kvpipe.records import (
    RUN_FINISHED,
    RUN_PLANNED,
    Check,
    RunFinished,
    phase_from_json,
    planned_from_json,
)
from kvpipe.sinks.console import ConsoleTable

# Rich's own frame draws a window and loads a font from the network; this one does neither.
FRAME = """\
<svg viewBox="0 0 {width} {height}" xml:space="preserve" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
{styles}
</style>
<rect width="100%" height="100%" rx="10" fill="#191919"/>
<defs>{lines}</defs>
<g transform="translate(10, 20)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
WIDER_THAN_ANY_LINE = 400


def print_run(records: Sequence[dict[str, Any]], experiment: str, console: Console) -> None:
    """Print the run to ``console`` as ``python -m kvpipe`` does at a terminal."""
    table = ConsoleTable(console)
    steps = [r["phase"] for r in records if r["phase"] not in (RUN_PLANNED, RUN_FINISHED)]
    table.run_started({"experiment": experiment, "pipeline": steps})
    for record in records:
        if record["phase"] == RUN_PLANNED:
            table.run_planned(planned_from_json(record))
        elif record["phase"] == RUN_FINISHED:
            table.run_finished(_finished(record))
        else:
            table.phase_finished(phase_from_json(record))


def svg(records: Sequence[dict[str, Any]], experiment: str) -> str:
    """Return the picture of the run."""
    console = Console(record=True, file=io.StringIO(), width=WIDER_THAN_ANY_LINE)
    print_run(records, experiment, console)
    lines = console.export_text(clear=False).splitlines()
    console.width = max(len(line.rstrip()) for line in lines)
    return console.export_svg(theme=DIMMED_MONOKAI, code_format=FRAME, unique_id="run")


def _finished(record: dict[str, Any]) -> RunFinished:
    names = {field.name for field in fields(RunFinished)} - {"fields", "checks"}
    known = {name: record[name] for name in names}
    rest = {name: value for name, value in record.items() if name not in {*names, "checks"}}
    checks = [Check(**check) for check in record["checks"]]
    return RunFinished(**known, checks=checks, fields=rest)


def main(records_file: Path, picture: Path) -> None:
    """Read the records and write the picture."""
    records = [json.loads(line) for line in records_file.read_text().splitlines()]
    picture.write_text(svg(records, experiment=records_file.absolute().parents[1].name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
