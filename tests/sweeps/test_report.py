"""Table, page and picture of a sweep, from synthetic records."""

import io
import json
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from kvpipe.report.drawing import Line
from kvpipe.report.png import as_png
from kvpipe.report.sweep import bytes_a_token, picture, sweep_page
from kvpipe.report.sweep_table import print_sweep
from tests.report.html_page import Page
from tests.report.test_page_in_browser import BROWSER, needs_browser
from tests.sweeps.sweep_records import KEY, failed, job, mixed, skipped, sweep


def table_of(record, monkeypatch, columns=140):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    print_sweep(record, out)
    return out.getvalue()


def test_the_table_has_a_row_for_each_job_and_the_bytes_of_a_token(monkeypatch):
    text = table_of(sweep(job(0, 1024), job(1, 2048)), monkeypatch)
    rows = [line.split() for line in text.splitlines()]
    assert [rows[1], rows[2], rows[3][:5]] == [
        ["max_"],
        ["total_", "same"],
        ["job", "tokens", "result", "KV", "bytes"],
    ]
    assert rows[4] == (
        [
            "0",
            "1024",
            "held",
            "3,148,800",
            "exact",
            "3,148,800",
            "yes",
            "28.61",
            "MiB",
            "0.250",
            "s",
            "yes",
        ]
    )
    assert "the KV cache takes 3,072 bytes a token\n" in text
    assert "passed (2 jobs: 2 held, exit code 0)\n" in text
    assert text.endswith("sweep  /sweeps/1\npage   /sweeps/1/sweep.html\n")


def test_a_narrow_terminal_gets_every_number_but_the_peak(monkeypatch):
    size = 9_663_750_144
    sizes = {"kv_bytes": size, "planned_kv_bytes": size, "freed_bytes": size}
    jobs = [job(n, 1024 << n, **sizes) for n in (0, 9)]
    lines = table_of(sweep(*jobs), monkeypatch, 80).splitlines()
    assert max(len(line) for line in lines[1:6]) <= 80
    row = "0 1024 held 9,663,750,144 exact 9,663,750,144 yes 0.250 s yes"
    assert lines[4].split() == row.split()


def test_below_the_table_are_the_failures_and_the_command_that_repeats_them(monkeypatch):
    text = table_of(mixed(), monkeypatch)
    assert "* not run again: records of an earlier sweep\n" in text
    assert "✗ max_total_tokens=4096: engine_ready_dummy: the check 'plan/kv' failed\n" in text
    assert "✗ max_total_tokens=8192: <it> broke badly\n  again: python -m kvpipe " in text
    assert "skipped max_total_tokens=1073741824: the plan does not fit: step" in text
    counts = "5 jobs: 2 held, 2 failed, 1 skipped; 1 taken over from earlier sweeps"
    assert f"failed ({counts}, exit code 1)\n" in text
    (row,) = (line for line in text.splitlines() if line.strip().startswith("2 "))
    assert "+512" in row


def test_the_record_is_one_line_of_exact_numbers():
    line = json.loads(mixed().line)
    assert (line["phase"], line["exit_code"], len(line["jobs"])) == ("sweep_finished", 1, 5)
    assert not any(isinstance(job["kv_bytes"], float) for job in line["jobs"])


def test_the_page_has_the_verdict_each_job_and_how_to_repeat_it(tmp_path):
    page = Page(sweep_page(mixed(), tmp_path))
    assert page.text_of("p", class_="said") == "Failed"
    reported = [e["text"] for e in page.all("li")]
    assert "max_total_tokens=8192: <it> broke badly" in reported
    assert "max_total_tokens=4096: engine_ready_dummy: the check 'plan/kv' failed" in reported
    assert page.all("text", text="12.00 MiB, +512 B off the plan")
    heading, *rows = page.table("Jobs")
    assert heading == [
        *("job", KEY, "result", "KV bytes", "planned", "freed", "fits", "peak", "rebuild"),
        "same output",
    ]
    assert rows[0][:4] == ["0", "1024", "✓ held", "3,148,800"]
    assert rows[1][2] == "✓ heldtaken over from /sweeps/0/7"
    assert [row[4] for row in rows[:3]] == ["exact", "exact", "+512" + "12,585,984 planned"]
    assert rows[2][3] == "12,586,496"
    assert rows[3][2:5] == ["✗ failed", "–", "25,168,896"]
    assert rows[4][6] == "no8,000,000 tokens would"
    commands = [f"python -m kvpipe {KEY}={tokens}" for tokens in (4096, 8192)]
    assert [e["text"] for e in page.all("pre", class_="text")] == commands


def test_the_page_of_a_sweep_that_held_has_no_part_about_doing_it_again(tmp_path):
    page = Page(sweep_page(sweep(job(0, 1024), job(1, 2048), skipped(2, 1 << 30)), tmp_path))
    assert page.text_of("p", class_="said") == "Held"
    assert page.all("section", id="again") == []
    assert [e["text"] for e in page.all("dt")] == [
        *("A token", "Largest KV cache", "Would still fit", "Slowest rebuild")
    ]


def test_a_job_is_linked_to_its_page_if_it_has_one(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/report.html").touch()
    here = [replace(job(n, 1024 * (n + 1)), run_dir=str(tmp_path / str(n))) for n in (0, 1)]
    page = Page(sweep_page(sweep(*here), tmp_path))
    links = [e["href"] for e in page.all("a") if not e["href"].startswith("#")]
    assert links == ["0/report.html"]
    (tmp_path / "elsewhere").mkdir()
    page = Page(sweep_page(sweep(*here), tmp_path / "elsewhere"))
    assert page.all("a", href="../0/report.html")


def test_without_tokens_among_what_is_swept_the_jobs_are_bars(tmp_path):
    jobs = [
        replace(job(n, 2048), values={"engine.page_size": str(size)})
        for n, size in enumerate((1, 16))
    ]
    record = sweep(*jobs, swept=("engine.page_size",))
    page = Page(sweep_page(record, tmp_path))
    assert {"page_size=1", "page_size=16"} <= {e["text"] for e in page.all("text")}
    assert "bytes a token" not in sweep_page(record, tmp_path)
    assert page.table("Jobs")[1][3:5] == ["6,294,528", "exact"]


def test_the_plot_joins_the_plans_of_jobs_that_differ_in_their_tokens_alone():
    swept = ("engine.page_size", KEY)
    jobs = [
        replace(job(number, tokens), values={"engine.page_size": page, KEY: str(tokens)})
        for number, (page, tokens) in enumerate(product(("1", "16"), (1024, 2048, 4096)))
    ]
    shapes = picture(sweep(*jobs, swept=swept)).shapes
    plans = [s for s in shapes if isinstance(s, Line) and s.role == "peak" and s.x1 > s.x2 > 90]
    assert len(plans) == 4
    assert bytes_a_token(sweep(*jobs, swept=swept)) is None


def test_a_sweep_that_has_measured_nothing_has_no_picture(tmp_path):
    record = sweep(failed(0, 1), failed(1, 2))
    assert picture(record) is None
    assert Page(sweep_page(record, tmp_path)).all("figure") == []


def test_values_that_are_close_together_keep_their_labels_apart():
    drawing = picture(sweep(*(job(n, 64 << n) for n in range(11))))
    texts = [s for s in drawing.shapes if type(s).__name__ == "Text" and s.text[0].isdigit()]
    boxes = [_box(text) for text in texts]
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) > 11
            assert apart, (one, other)
    assert {"65,536", "192.0 MiB"} <= {text.text for text in texts}
    assert as_png(drawing).startswith(b"\x89PNG")


def _box(text):
    wide = 0.5 * text.size * len(text.text)
    left = text.x - {"start": 0, "middle": wide / 2, "end": wide}[text.anchor]
    return left, left + wide, text.y


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_and_complains_of_nothing(tmp_path: Path, width: int) -> None:
    page = tmp_path / "sweep.html"
    page.write_text(sweep_page(mixed(), tmp_path))
    assert BROWSER is not None
    shown = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ">taken over from /sweeps/0/7<" in shown.stdout
    assert "CONSOLE" not in shown.stderr
