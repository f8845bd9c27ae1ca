"""Charts, and the two forms in which they are seen: SVG and PNG."""

import io
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvpipe.report.chart import NARROW, WIDE, Bar, Chart, Part, Row
from kvpipe.report.drawing import Drawing, Line, Rect, Text
from kvpipe.report.figures import DevicesChart, memory_chart
from kvpipe.report.palette import DARK, LIGHT
from kvpipe.report.picture import timeline
from kvpipe.report.png import as_png
from kvpipe.report.render import as_svg
from kvpipe.report.run import run_of
from tests.sinks.pipeline_records import STEPS, ledger, passed, phase, pipeline, started, with_peak

RUN = run_of("r", [started(), *pipeline(), passed()])
SVG = "{http://www.w3.org/2000/svg}"


def texts(drawing):
    return [shape.text for shape in drawing.shapes if isinstance(shape, Text)]


def bars(drawing, faded=False):
    return [s for s in drawing.shapes if isinstance(s, Rect) and s.faded == faded]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_phase_has_its_name_and_its_bytes_inside_the_picture(width):
    drawing = memory_chart(RUN).drawn(width)
    assert set(STEPS) <= set(texts(drawing))
    assert "20.64 GiB (24.64 GiB)" in texts(drawing)
    for shape in drawing.shapes:
        if isinstance(shape, Rect):
            assert 0 <= shape.x <= shape.x + shape.width <= width
            assert shape.y + shape.height <= drawing.height
        if isinstance(shape, Text):
            room = 0.62 * shape.size * len(shape.text)
            left = {"start": 0, "middle": 0.5, "end": 1}[shape.anchor] * room
            assert shape.x - left >= -1
            assert shape.x - left + room <= width + 1, shape.text


def test_bars_are_as_long_as_their_bytes():
    drawing = memory_chart(RUN).drawn(WIDE)
    by_tip = {bar.tip: bar.width for bar in bars(drawing)}
    kv = by_tip["kv_cache_rebuilt, measured: kv 9,663,750,144 bytes (9.000 GiB)"]
    params = by_tip["kv_cache_rebuilt, measured: params 6,248,972,288 bytes (5.820 GiB)"]
    assert kv / params == pytest.approx(9_663_750_144 / 6_248_972_288)


def test_a_peak_inside_a_phase_is_a_whisker_with_its_bytes():
    records = [phase(i, peak=None) for i in range(16)]
    quiet = memory_chart(run_of("r", records)).drawn(WIDE)
    records[5] = with_peak(phase(5), sum(ledger(5).values()) + (5 << 30))
    drawing = memory_chart(run_of("r", records)).drawn(WIDE)
    whiskers = [s for s in drawing.shapes if isinstance(s, Line) and s.role == "peak"]
    assert len(whiskers) == 2
    assert "14.82 GiB (19.82 GiB)" in texts(drawing)
    assert not [s for s in quiet.shapes if isinstance(s, Line) and s.role == "peak"]


def test_steps_that_were_planned_and_not_reached_are_shown():
    from kvpipe.records.run import Fit, PlannedPhase, RunPlanned

    planned = tuple(PlannedPhase(step, {"kv": 8}, 8, 8) for step in STEPS)
    plan = RunPlanned("cpu", 1, "0.0.2", planned, Fit(True, 9, STEPS[0], 4))
    run = run_of("r", [started(), plan, *pipeline()[:4]])
    drawing = memory_chart(run).drawn(WIDE)
    quiet = [s.text for s in drawing.shapes if isinstance(s, Text) and s.role == "quiet"]
    assert set(STEPS[4:]) <= set(quiet)
    assert len(bars(drawing, faded=True)) == len(STEPS)


def test_hundreds_of_phases_are_thin_rows_with_a_name_for_each_cycle():
    records = [phase(i % 16, f"{STEPS[i % 16]}#{i // 16 + 2}") for i in range(320)]
    chart = memory_chart(run_of("r", records))
    drawing = chart.drawn(NARROW)
    assert chart.dense
    assert drawing.height < 2000
    assert [t for t in texts(drawing) if t.startswith("cycle")] == [
        f"cycle {k}" for k in range(2, 22)
    ]


@pytest.mark.parametrize("phases", [0, 1, 5])
def test_a_run_of_few_records_has_its_pictures_too(phases):
    run = run_of("r", [started(), *pipeline()[:phases]])
    assert as_png(timeline(run)).startswith(b"\x89PNG")
    assert bool(DevicesChart.of(run).series) == (phases >= 2)


@given(st.integers(1, 1 << 50))
def test_an_axis_has_a_few_round_ticks(size):
    chart = Chart("t", "d", [Row("a", [Bar([Part("kv", "pool-kv", size)], "measured")])])
    ticks = [s for s in chart.drawn(WIDE).shapes if isinstance(s, Line) and s.role == "grid"]
    assert 2 <= len(ticks) <= 7


def test_the_limit_of_the_devices_is_drawn_where_it_is_near():
    row = Row("a", [Bar([Part("kv", "pool-kv", 10)], "measured")])
    for limit, lines in ((12, 1), (1000, 0)):
        drawing = Chart("t", "d", [row], limit).drawn(WIDE)
        found = [s for s in drawing.shapes if isinstance(s, Line) and s.role == "limit"]
        assert len(found) == lines


def test_an_svg_says_what_it_shows_to_those_who_cannot_see_it():
    svg = as_svg(Drawing(10, 20, "a < b", 'c & "d"', [Text(1, 2, "x<y", "ink")]))
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == ["picture-title", "picture-description"]
    assert root.find(f"{SVG}title").text == "a < b"
    assert root.find(f"{SVG}desc").text == 'c & "d"'
    assert root.find(f"{SVG}text").text == "x<y"


def test_the_png_shows_the_same_colours_as_the_chart():
    drawing = timeline(RUN)
    image = Image.open(io.BytesIO(as_png(drawing))).convert("RGB")
    assert image.size == (2 * drawing.width, 2 * drawing.height)
    for bar in bars(drawing):
        if bar.width > 2:
            middle = (2 * (bar.x + bar.width / 2), 2 * (bar.y + bar.height / 2))
            seen = "#{:02x}{:02x}{:02x}".format(*image.getpixel(tuple(map(int, middle))))
            if bar.role != "ground":
                assert seen == LIGHT[bar.role], bar


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_bars_contrast_with_the_background(palette):
    """WCAG 2: 4.5:1 for texts, on the raised ground too, and 3:1 for what a picture needs."""
    for role in ("ink", "quiet", "good", "bad", "link"):
        assert contrast(palette[role], palette["ground"]) >= 4.5, role
        assert contrast(palette[role], palette["raised"]) >= 4.5, role
    for role in (role for role in palette if role.startswith("pool-")):
        assert contrast(palette[role], palette["ground"]) >= 2.9, role
