"""The report of a run: ``timeline.png`` and ``report.html`` in its directory, also if it failed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kvpipe.errors import RecordError
from kvpipe.records.run import Record, RunFinished
from kvpipe.report.run import PAGE_FILE, Run, run_of
from kvpipe.sinks import Collector

TIMELINE_FILE = "timeline.png"


class ReportFile(Collector):
    """Writes a file of a run's report, by :func:`write_timeline` or :func:`write_page`, at the end.

    The picture comes before W&B, which logs it; the page after W&B, so that it shows a failure of
    W&B.
    """

    @property
    def name(self) -> str:
        """The function that writes the file."""
        return self._write.__name__

    def __init__(
        self,
        run_dir: Path,
        write: Callable[[Run, Path], Path],
        earlier: Sequence[Record] = (),
    ) -> None:
        super().__init__(earlier)
        self._run_dir = run_dir
        self._write = write

    def run_finished(self, record: RunFinished) -> None:
        """Write the file.

        Raises:
            RecordError: it cannot be written.
        """
        self._write(run_of(self._run_dir.name, [*self._records, record]), self._run_dir)


def write_timeline(run: Run, folder: Path) -> Path:
    """Write the picture of a run's memory timeline into a folder, as :func:`written` does."""
    from kvpipe.report.picture import timeline
    from kvpipe.report.png import as_png

    return written(folder / TIMELINE_FILE, as_png(timeline(run)))


def write_page(run: Run, folder: Path) -> Path:
    """Write the report page of a run into a folder, as :func:`written` does."""
    from kvpipe.report.page import report_page

    return written(folder / PAGE_FILE, report_page(run).encode())


def written(path: Path, content: bytes) -> Path:
    """Write a file of a report and return its path.

    Raises:
        RecordError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RecordError(f"{path}: cannot write the report: {error.strerror}") from error
    return path
