"""The pages in a real browser, where there is one: nothing in its console, every row laid out."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvpipe.report.page import report_page
from kvpipe.report.run import run_of
from tests.sinks.pipeline_records import STEPS, passed, pipeline, started

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium on the PATH")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_and_complains_of_nothing(tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    page.write_text(report_page(run_of("r", [started(), *pipeline(), passed()])))
    assert BROWSER is not None
    shown = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert all(f">{step}</text>" in shown.stdout for step in STEPS)
    assert "CONSOLE" not in shown.stderr
