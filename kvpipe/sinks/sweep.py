"""Write a sweep's results (``sweep.json``, ``sweep.html``, ``sweep.png``) and show them."""

import sys
from pathlib import Path

from kvpipe.config.schema import OutputFormat
from kvpipe.records.sweep import SWEEP_PAGE, SweepFinished
from kvpipe.sinks.report import written

JSON_FILE = "sweep.json"
PICTURE_FILE = "sweep.png"


def write_sweep(sweep: SweepFinished, folder: Path) -> list[Path]:
    """Write record, page and picture of a sweep into a directory and return their paths.

    Raises:
        KvpipeError: a file cannot be written.
    """
    from kvpipe.report.png import as_png
    from kvpipe.report.sweep import picture, sweep_page

    paths = [
        written(folder / JSON_FILE, f"{sweep.line}\n".encode()),
        written(folder / SWEEP_PAGE, sweep_page(sweep, folder).encode()),
    ]
    # Without a measured KV cache there is nothing to draw.
    if drawing := picture(sweep):
        paths.append(written(folder / PICTURE_FILE, as_png(drawing)))
    return paths


def show_sweep(sweep: SweepFinished, output: OutputFormat) -> None:
    """Show a sweep on stdout: ``table`` for people, ``json``, one line, for pipes."""
    if output is OutputFormat.json:
        print(sweep.line, flush=True)
        return
    from kvpipe.report.sweep_table import print_sweep

    print_sweep(sweep, sys.stdout)
