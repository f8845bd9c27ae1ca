"""Sinks of installed packages: an error in one is refused, or reported with exit code 3."""

import sys

import pytest
from pipeline_records import passed, phase, plan, started

from kvpipe.errors import InputError, RecordError
from kvpipe.sinks import Sinks
from kvpipe.sinks.own import origins, own_sinks
from kvpipe.system import plugins
from tests.installed_package import install
from tests.refusal import refusal

SINK = """
from kvpipe.sinks import Sink


class Lines(Sink):
    def __init__(self, run_dir):
        self.run_dir, self.lines = run_dir, []

    def received(self, record):
        self.lines.append(record.line)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a package ``acme`` with a sink of this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source, point="acme:Lines"):
        install(tmp_path, "acme", {"acme.py": source}, sinks={"lines": point})
        plugins.installed.cache_clear()

    yield write
    plugins.installed.cache_clear()
    sys.modules.pop("acme", None)


def test_a_sink_of_a_package_receives_every_record(installed, tmp_path):
    installed(SINK)
    (sink,) = own_sinks(["lines"], tmp_path)
    records = [started(), plan(), phase(1), passed()]
    sinks = Sinks([sink])
    for call, record in zip(
        (sinks.run_started, sinks.run_planned, sinks.phase_finished, sinks.run_finished),
        records,
        strict=True,
    ):
        call(record)
    assert (sink.run_dir, sink.lines) == (tmp_path, [record.line for record in records])
    assert str(origins(["lines"])["lines"]).startswith("acme 2.1, acme:Lines (sha256 ")


@pytest.mark.parametrize(
    ("source", "point", "message"),
    [
        (f"{SINK}\nint('x')\n", "acme:Lines", "acme:Lines, line 12: ValueError: invalid literal"),
        ("import nosuch\n", "acme:Lines", "acme:Lines, line 1: ModuleNotFoundError: No module"),
        (SINK, "acme:Line", "acme:Line: AttributeError: module 'acme' has no attribute 'Line'"),
        (SINK, "acme", "acme: it is not a class; write lines = 'PACKAGE.MODULE:CLASS'"),
    ],
    ids=["raises", "missing import", "no such class", "a module"],
)
def test_a_sink_that_cannot_be_loaded_is_refused_with_its_line(installed, source, point, message):
    installed(source, point)
    reported = refusal(origins, ["lines"])
    assert reported.startswith(f"kvpipe.sinks: acme 2.1, {message}")


def test_what_is_no_sink_or_cannot_be_made_is_refused(installed, tmp_path):
    installed(f"{SINK}        1 / 0\n\nclass Other:\n    pass\n", "acme:Other")
    assert refusal(own_sinks, ["lines"], tmp_path) == (
        "sinks: 'lines' is the class Other, which does not extend Sink"
    )
    assert refusal(origins, ["line"]) == (
        "sinks: no installed package has a sink 'line'; did you mean 'lines'?"
    )


def test_a_sink_that_needs_more_than_the_run_directory_is_refused(installed, tmp_path):
    installed(SINK.replace("self, run_dir", "self, run_dir, url"))
    with pytest.raises(InputError, match=r"sinks: 'lines': TypeError: .*missing 1 required"):
        own_sinks(["lines"], tmp_path)


@pytest.mark.parametrize("fault", ["1 / 0", "import sys; sys.exit(0)"])
def test_a_sink_that_fails_during_a_run_is_reported_as_lost_telemetry(installed, tmp_path, fault):
    """Not as a defect of kvpipe; the sinks after it get the last record with the failure."""
    installed(SINK.replace("self.lines.append(record.line)", fault))
    (fails,) = own_sinks(["lines"], tmp_path)

    class Last(type(fails)):
        def received(self, record):
            self.lines.append(record)

    last = Last(tmp_path)
    with pytest.raises(RecordError, match=r"sink Lines, line 10: (ZeroDivision|SystemExit)"):
        Sinks([fails, last]).run_finished(passed())
    (record,) = last.lines
    assert (record.status, record.exit_code) == ("failed", 3)
