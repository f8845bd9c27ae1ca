"""``kvpipe report``: write the report of a finished run or sweep again."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from kvpipe.config.schema import Kvpipe, from_plain, to_plain
from kvpipe.errors import HELD, InputError
from kvpipe.report.run import read_run, records_file
from kvpipe.sinks.report import write_page, write_timeline
from kvpipe.sinks.sweep import write_sweep
from kvpipe.sweeps.jobs import is_sweep
from kvpipe.sweeps.summary import summary_of


def act(composed: DictConfig, paths: Sequence[Path]) -> int:
    """Rewrite the report of a run or a sweep from its records.

    Raises:
        KvpipeError: there are no records, or the report cannot be written.
    """
    config = from_plain(to_plain(composed))
    if len(paths) != 1:
        raise InputError(
            f"report: name one directory of a run or a sweep, not {len(paths)}: report DIR"
        )
    (path,) = paths
    if is_sweep(path):
        print(*write_sweep(summary_of(path), _report_folder(config, path)), sep="\n")
        return HELD
    found = read_run(path)
    folder = _report_folder(config, records_file(path).parent)
    print(write_page(found, folder), write_timeline(found, folder), sep="\n")
    return HELD


def _report_folder(config: Kvpipe, own: Path) -> Path:
    """Return the directory of a report: the configured one, else ``own``."""
    folder = Path(config.report.dir) if config.report.dir else own
    if not folder.is_dir():
        raise InputError(f"report.dir: there is no directory {folder}")
    return folder
