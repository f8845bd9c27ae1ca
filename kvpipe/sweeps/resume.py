"""Find a finished run of an earlier sweep with a job's exact config, and reuse its records."""

import json
import shutil
from pathlib import Path
from typing import Any

from kvpipe.errors import InputError
from kvpipe.records.run import PASSED, RECORDS_FILE, RunStarted
from kvpipe.report.run import read_run
from kvpipe.sinks.report import write_page, write_timeline

# These do not influence the measurements.
_NOT_COMPARED = (
    "compare",
    "compare_plans",
    "describe",
    "label",
    "output",
    "report",
    "sinks",
    "sweep",
    "tracking",
)


def finished_run(started: RunStarted, run_dir: Path, sweep_dir: Path) -> Path | None:
    """Return the directory of a run that passed with the config and versions of ``started``.

    The job's own directory may have an earlier attempt; then the sweep's directory and those next
    to it are searched, the newest run first.
    """
    found = sweep_dir.absolute().parent.glob(f"*/*/{RECORDS_FILE}")
    newest_first = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    for records in [run_dir / RECORDS_FILE, *newest_first]:
        try:
            run = read_run(records)
        except InputError:
            continue  # this version cannot read it
        if run.status == PASSED and run.started and _same(run.started, started):
            return records.parent
    return None


def take_over(found: Path, run_dir: Path) -> None:
    """Reuse the records of a finished run for the job whose directory is ``run_dir``."""
    if found.absolute() != run_dir.absolute():
        shutil.copyfile(found / RECORDS_FILE, run_dir / RECORDS_FILE)
    run = read_run(run_dir)
    write_timeline(run, run_dir)
    write_page(run, run_dir)


def _same(one: RunStarted, other: RunStarted) -> bool:
    return _compared(one) == _compared(other) and dict(one.versions) == dict(other.versions)


def _compared(started: RunStarted) -> dict[str, Any]:
    config = json.loads(started.line)["config"]
    config.get("trainer", {}).pop("checkpoint_dir", None)  # below the run's own directory
    return {key: value for key, value in config.items() if key not in _NOT_COMPARED}
