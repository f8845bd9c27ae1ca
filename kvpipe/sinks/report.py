"""The report of a run: ``timeline.png`` and ``report.html`` in its directory, also if it failed."""

from pathlib import Path

from kvpipe.errors import KvpipeError
from kvpipe.records import RunFinished
from kvpipe.report.run import Run, run_of
from kvpipe.sinks.collector import Collector

PAGE_FILE = "report.html"
TIMELINE_FILE = "timeline.png"


class _Report(Collector):
    """Makes something of the records in the run's directory.

    Args:
        run_dir: directory of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def _run(self, last: RunFinished) -> Run:
        return run_of(self._run_dir.name, [*self._records, last])


class TimelinePicture(_Report):
    """Writes the picture of the memory timeline; it stands before W&B, which logs it."""

    def run_finished(self, record: RunFinished) -> None:
        """Write the picture.

        Raises:
            KvpipeError: it cannot be written.
        """
        write_timeline(self._run(record), self._run_dir)


class ReportPage(_Report):
    """Writes the page; it stands after W&B, whose failure the page has to tell."""

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
