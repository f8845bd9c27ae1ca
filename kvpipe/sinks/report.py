"""The report of a run: ``timeline.png`` and ``report.html`` in its directory, also if it failed."""

from pathlib import Path

from kvpipe.errors import KvpipeError
from kvpipe.records.run import RunFinished
from kvpipe.report.run import PAGE_FILE, Run, run_of
from kvpipe.sinks.collector import Collector

TIMELINE_FILE = "timeline.png"


class _Report(Collector):
    """Writes a report of the records into the run's directory.

    Args:
        run_dir: directory of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def _run(self, last: RunFinished) -> Run:
        return run_of(self._run_dir.name, [*self._records, last])


class TimelinePicture(_Report):
    """Writes the picture of the memory timeline; it comes before W&B, which logs it."""

    def run_finished(self, record: RunFinished) -> None:
        """Write the picture.

        Raises:
            KvpipeError: it cannot be written.
        """
        write_timeline(self._run(record), self._run_dir)


class ReportPage(_Report):
    """Writes the page; it comes after W&B, so that the page shows a failure of W&B."""

    def run_finished(self, record: RunFinished) -> None:
        """Write the page.

        Raises:
            KvpipeError: it cannot be written.
        """
        write_page(self._run(record), self._run_dir)


def write_timeline(run: Run, folder: Path) -> Path:
    """Write the picture of a run's memory timeline into a folder and return its path.

    Raises:
        KvpipeError: it cannot be written.
    """
    from kvpipe.report.picture import timeline
    from kvpipe.report.png import as_png

    return written(folder / TIMELINE_FILE, as_png(timeline(run)))


def write_page(run: Run, folder: Path) -> Path:
    """Write the report page of a run into a folder and return its path.

    Raises:
        KvpipeError: it cannot be written.
    """
    from kvpipe.report.page import report_page

    return written(folder / PAGE_FILE, report_page(run).encode())


def written(path: Path, content: bytes) -> Path:
    """Write a file of a report and return its path.

    Raises:
        KvpipeError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise KvpipeError(f"{path}: cannot write the report: {error.strerror}") from error
    return path
