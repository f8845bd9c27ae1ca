"""Draw a run from its records: run.svg and timeline.svg, the pictures in README.md.

make run
.venv/bin/python docs/make_picture.py outputs/tiny/<date>/records.jsonl docs

The console sink prints the table and the report draws the timeline; this file only adds the frames.
The first picture shows the run directory, so use a run from a directory that may be published.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from kvpipe.records.run import Record, RunFinished, RunPlanned, RunStarted, record_from_json
from kvpipe.report.picture import timeline
from kvpipe.report.render import as_svg
from kvpipe.report.run import run_of
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


def print_run(records: Sequence[Record], console: Console) -> None:
    """Print the run to ``console`` as ``python -m kvpipe`` does at a terminal."""
    table = ConsoleTable(console)
    for record in records:
        if isinstance(record, RunStarted):
            table.run_started(record)
        elif isinstance(record, RunPlanned):
            table.run_planned(record)
        elif isinstance(record, RunFinished):
            table.run_finished(record)
        else:
            table.phase_finished(record)


def svg(records: Sequence[Record]) -> str:
    """Return the picture of the run."""
    console = Console(record=True, file=io.StringIO(), width=WIDER_THAN_ANY_LINE)
    print_run(records, console)
    lines = console.export_text(clear=False).splitlines()
    console.width = max(len(line.rstrip()) for line in lines)
    return console.export_svg(theme=DIMMED_MONOKAI, code_format=FRAME, unique_id="run")


def timeline_svg(records: Sequence[Record]) -> str:
    """Return the memory timeline of the run, in the viewer's light or dark colours."""
    return as_svg(timeline(run_of("run", records)))


def main(records_file: Path, folder: Path) -> None:
    """Read the records and write the pictures."""
    lines = records_file.read_text().splitlines()
    records = [record_from_json(json.loads(line)) for line in lines]
    (folder / "run.svg").write_text(svg(records))
    (folder / "timeline.svg").write_text(timeline_svg(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
