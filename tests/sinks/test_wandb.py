"""The W&B sink against the real wandb library: offline, and with a local server for online.

wandb keeps state of its own for a whole process, so what must be seen from outside (stdout,
which modules are imported) runs in a process of its own, and every other test ends with a teardown.
"""

import base64
import html
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import wandb_file
import wandb_server
from pipeline_records import (
    KV_BYTES,
    OUTPUT,
    PARAM_BYTES,
    PROMPT,
    STEPS,
    failed,
    passed,
    phase,
    pipeline,
    sha256,
    started,
)

from kvpipe.config.schema import TrackingConfig, TrackingMode
from kvpipe.errors import InputError, TrackingError
from kvpipe.records.metrics import metrics
from kvpipe.sinks import Handed
from kvpipe.sinks.wandb import WandbSink
from kvpipe.sinks.wandb_tables import alert_of
from tests.processes import suspend

# A thread of wandb that watches the network may outlive a teardown, and then says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STUCK_SERVICE = Path(__file__).parents[1] / "stuck/wandb-core"
KEY = "a1b2" * 10
LIMIT = 100
CONFIG = {
    "experiment": "tiny",
    "label": None,
    "pipeline": STEPS,
    "phases": {"generate_result": {"max_new_tokens": 4}},
    "engine": {"max_total_tokens": 4096, "mem_fraction_static": 0.8, "tp_size": None},
    "prompt": {"text": None, "file": "pkg://conf/prompt/code.txt"},
}
# As in the issue, which has them from the script that kvpipe replaces.
METRICS = [
    "phase/idx",
    "phase/name",
    "time/elapsed_s",
    "mem/process/rss_bytes",
    "kv/fused_bytes_total",
    "kv/fused_bytes_per_layer",
    "kv/deleted_buffers",
    "num_params",
    "num_model_state_leaves",
    "determinism/same_output",
    "sample_texts/path",
    "sample_prompt/path",
    "sample_prompt_chars",
    "sample_prompt_truncated",
    "sample_output_text_1/path",
    "sample_output_text_1_chars",
    "sample_output_text_1_truncated",
    "sample_output_text_2/path",
    "sample_output_text_2_chars",
    "sample_output_text_2_truncated",
]
DEVICE_FIELDS = ["bytes_in_use", "peak_bytes_in_use", "bytes_limit", "largest_free_block_bytes"]

OFFLINE_RUN = """
import json, sys
from pathlib import Path
from pipeline_records import passed, pipeline, plan, started
from kvpipe.config.schema import TrackingConfig
from kvpipe.sinks import Handed
from kvpipe.sinks.report import ReportFile, write_timeline
from kvpipe.sinks.wandb import WandbSink
run_dir, config, key = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
tracking = TrackingConfig(project="kv", name="run 1", group="g", tags=["a"], text_max_chars=int(sys.argv[4]))
sink = WandbSink(tracking, run_dir, key)
sink.run_started(started(config))
(run_dir / "started.json").write_text(json.dumps(sink.start(config)))
for record in pipeline():
    sink.phase_started(record.phase, record.idx, 16)
    sink.phase_finished(record)
    if record.idx == 0:
        sink.run_planned(plan())
ReportFile(run_dir, write_timeline).run_finished(passed(run_dir))
sink.run_finishes(Handed(18, [record.phase for record in pipeline()]))
sink.run_finished(passed(run_dir))
"""

HANGING_START = """
import json, sys
from pathlib import Path
import psutil
from pipeline_records import failed
from wandb.sdk.lib.service import service_process
from kvpipe.config.schema import TrackingConfig
from kvpipe.errors import TrackingError
from kvpipe.sinks.wandb import WandbSink
real, config, left = service_process.get_core_path, json.loads(sys.argv[3]), []
def said_by(core, limit_s):
    service_process.get_core_path = core
    sink = WandbSink(TrackingConfig(init_timeout_s=limit_s), Path(sys.argv[1]), None)
    try:
        return sink.start(config)["mode"]
    except TrackingError as error:
        return str(error)
    finally:
        sink.run_finished(failed())
        if core is not real:
            children = [child.name() for child in psutil.Process().children()]
            left.extend(name for name in children if name.startswith("wandb-core"))
said = [said_by(*start) for start in [(lambda: sys.argv[2], 0.1), (lambda: "false", 60), (real, 60)]]
print(json.dumps([said, left]))
"""


def python(code, *arguments, **environment):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, **environment},
        capture_output=True,
    )


class Offline:
    """One offline run of the whole pipeline, and what can be read back from it."""

    def __init__(self, root):
        self.home = root / "home"
        # A sweep's run directory may have characters that a glob would take for its own.
        self.run_dir = root / "tp=[1,2]"
        for folder in (self.home, self.run_dir):
            folder.mkdir()
        # None of these may win over the config.
        hostile = {
            "WANDB_MODE": "wrong",
            "WANDB_RESUME_FROM": "wrong",
            "WANDB_SERVICE": "3-1-unix-/nosuch",
            "WANDB_DISABLED": "true",
            "WANDB_PROJECT": "wrong",
            "WANDB_NAME": "wrong",
            "WANDB_RUN_GROUP": "wrong",
            "WANDB_TAGS": "wrong",
            "WANDB_DIR": str(self.home),
            "WANDB_IGNORE_GLOBS": "*",
            "WANDB_NOTES": "wrong",
            "WANDB_JOB_TYPE": "wrong",
            "WANDB_RUN_ID": "wrong",
            "WANDB_RESUME": "allow",
            "WANDB_SWEEP_ID": "wrong",
            "WANDB_LAUNCH": "true",
            "WANDB_CONFIG": '{"experiment": "wrong"}',
            "TRAINING_JOB_NAME": "wrong",
        }
        self.process = python(
            OFFLINE_RUN,
            *(str(self.run_dir), json.dumps(CONFIG), KEY, str(LIMIT)),
            HOME=str(self.home),
            WANDB_API_KEY=KEY,
            **hostile,
        )
        assert self.process.returncode == 0, self.process.stderr.decode()
        self.started = json.loads((self.run_dir / "started.json").read_text())
        self.sync_dir = Path(self.started["dir"])
        self.file = wandb_file.read(self.sync_dir / f"run-{self.started['id']}.wandb")

    def uploaded(self, path):
        assert path in self.file["files"]
        return (self.sync_dir / "files" / path).read_bytes()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    return Offline(tmp_path_factory.mktemp("offline"))


@pytest.fixture
def wandb_process(tmp_path, monkeypatch):
    """A process that wandb has not touched, with a home of its own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield monkeypatch
    import wandb

    wandb.teardown()


@pytest.fixture
def server(wandb_process):
    with wandb_server.serve() as server:
        wandb_process.setenv("WANDB_BASE_URL", server.url)
        yield server


def online(run_dir, api_key=KEY, **more):
    given = {"init_timeout_s": 3.0, "finish_timeout_s": 3.0} | more
    return WandbSink(TrackingConfig(mode=TrackingMode.online, **given), run_dir, api_key)


def phase_rows(file):
    """Return the rows of the history but the last one, which has the phases side by side."""
    *rows, last = file["history"]
    assert "phase/name" not in last
    return rows


def files_with(secret, *folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret in path.read_bytes()]


def test_no_variable_of_the_environment_says_what_the_run_is(offline):
    """A sweep's id or a launch would make wandb drop the project, SageMaker give all jobs one id."""
    described = ("project", "group", "tags", "notes", "job_type", "sweep_id")
    assert {name: offline.file[name] for name in described} == {
        "project": "kv",
        "group": "g",
        "tags": ["a"],
        "notes": "",
        "job_type": "",
        "sweep_id": "",
    }
    assert offline.file["config"]["experiment"] == "tiny"
    assert offline.file["id"] == offline.started["id"] != "wrong"
    assert offline.started["name"] == "run 1"


def test_each_phase_is_a_row_with_its_metrics(offline):
    rows = phase_rows(offline.file)
    assert [row["_step"] for row in rows] == list(range(16))
    for row, record in zip(rows, pipeline(), strict=True):
        logged = metrics(record)
        assert {key: row.get(key) for key in logged} == logged


def test_the_history_has_every_key_that_dashboards_know(offline):
    keys = {key for row in offline.file["history"] for key in row}
    wanted = set(METRICS)
    wanted |= {f"mem/jax/{name}_{kind}" for name in DEVICE_FIELDS for kind in ("sum", "min", "max")}
    wanted |= {f"mem/jax/device{i}/{name}" for name in DEVICE_FIELDS for i in range(4)}
    assert wanted - keys == set()


def test_the_summary_has_every_key_that_dashboards_know(offline):
    expected = {
        "wandb/url": None,
        "wandb/id": offline.started["id"],
        "prompt/chars": len(PROMPT),
        "prompt/file": "pkg://conf/prompt/code.txt",
        "sample/prompt_sha256": sha256(PROMPT),
        "sample/output_text_sha256": sha256(OUTPUT),
        "sample/output_text": OUTPUT,
        "sample/output_text_chars": len(OUTPUT),
        "determinism/same_output": 1,
        "sample/output_text_after_rebuild_sha256": sha256(OUTPUT),
        "sample/output_text_after_rebuild": OUTPUT,
        "sample/output_text_after_rebuild_chars": len(OUTPUT),
        "run/status": "passed",
        "run/exit_code": 0,
    }
    summary = offline.file["summary"]
    assert {key: summary.get(key, "missing") for key in expected} == expected
    assert offline.file["exit_code"] == 0


def test_prompt_and_outputs_are_pages_of_escaped_text_that_may_be_cut(offline):
    rows = {key: value for row in offline.file["history"] for key, value in row.items()}
    texts = {"prompt": PROMPT, "output_text_1": OUTPUT, "output_text_2": OUTPUT}
    for name, text in texts.items():
        page = offline.uploaded(rows[f"sample_{name}/path"]).decode()
        assert page == f"<pre>{html.escape(text[:LIMIT])}</pre>"
        assert rows[f"sample_{name}/_type"] == "html-file"
        assert rows[f"sample_{name}_chars"] == len(text)
        assert rows[f"sample_{name}_truncated"] == (len(text) > LIMIT)


def test_the_picture_of_the_memory_timeline_is_media(offline):
    path = offline.file["summary"]["memory_timeline/path"]
    assert offline.uploaded(path) == (offline.run_dir / "timeline.png").read_bytes()
    assert offline.file["summary"]["memory_timeline/_type"] == "image-file"


def test_the_table_has_a_row_for_each_text(offline):
    path = offline.file["summary"]["sample_texts/path"]
    output = [sha256(OUTPUT), len(OUTPUT), True, OUTPUT[:LIMIT]]
    assert json.loads(offline.uploaded(path)) == {
        "columns": ["kind", "sha256", "chars", "truncated", "text"],
        "data": [
            ["prompt", sha256(PROMPT), len(PROMPT), False, PROMPT],
            ["output_1", *output],
            ["output_2", *output],
        ],
    }


def table_of(offline, key):
    return json.loads(offline.uploaded(offline.file["summary"][f"{key}/path"]))


def test_what_wandb_has_not_stored_fails_the_run_and_is_named(tmp_path, wandb_process):
    sink = WandbSink(TrackingConfig(), tmp_path, None)
    started = sink.start(CONFIG)
    for idx in (0, STEPS.index("generate_result")):
        sink.phase_finished(phase(idx))
    text = f"wandb_samples/{started['id']}/output_1_sha256_{sha256(OUTPUT)}.txt"
    (Path(started["dir"]) / "files" / text).unlink()
    sink._planned = True  # although no plan was logged
    sink.run_finishes(Handed(4, ["wandb_init", "generate_result", "kv_cache_dropped"]))
    with pytest.raises(TrackingError) as caught:
        sink.run_finished(passed())
    assert str(caught.value).startswith(
        "W&B has not stored the whole run: 1 of 3 rows are missing, first that of "
        "'kv_cache_dropped'; the media plan/phases are missing; of 6 files these are missing: "
        f"{text}; up to 2 rows"
    )


def test_the_plan_is_a_table_in_the_row_of_the_phase_after_it(offline):
    assert table_of(offline, "plan/phases") == {
        "columns": ["phase", "params_bytes", "kv_bytes", "total_bytes", "max_device_bytes"],
        "data": [
            ["wandb_init", 0, 0, 0, 0],
            ["engine_ready_dummy", PARAM_BYTES, KV_BYTES, PARAM_BYTES + KV_BYTES, 4 << 30],
        ],
    }
    assert [row["_step"] for row in phase_rows(offline.file) if "plan/phases/path" in row] == [1]


def test_the_phases_are_side_by_side_in_a_table_and_in_charts_by_their_names(offline):
    table = table_of(offline, "phases")
    records = pipeline()
    assert [row[0] for row in table["data"]] == STEPS
    column = {name: [row[i] for row in table["data"]] for i, name in enumerate(table["columns"])}
    assert column["total_bytes"] == [sum(record.ledger.values()) for record in records]
    assert column["peak_bytes"] == [r.peak and r.peak.bytes_in_use_total for r in records]
    charts = offline.file["config"]
    for name in ("duration_s", "total_bytes", "peak_bytes"):
        fields = charts[f"_wandb/visualize/by_phase/{name}"]["panel_config"]["fieldSettings"]
        assert fields == {"label": "phase", "value": name}


def test_charts_have_the_phases_and_not_wandbs_own_steps_as_their_x_axis(offline):
    assert offline.file["step_metrics"]["*"] == "phase/idx"


def test_the_run_has_its_group_and_tags(offline):
    assert (offline.file["group"], offline.file["tags"]) == ("g", ["a"])


def test_a_run_that_passed_alerts_nobody(offline):
    assert offline.file["alerts"] == []


def test_a_run_that_its_plan_skipped_alerts_nobody():
    refused = replace(failed(), exit_code=2)
    assert alert_of("tiny", refused) is not None
    assert alert_of("tiny", replace(refused, status="skipped")) is None


def test_a_failed_run_alerts_once_with_its_failed_checks_offline_too(tmp_path, wandb_process):
    import wandb

    sink = WandbSink(TrackingConfig(), tmp_path, None)
    started = sink.start(CONFIG)
    sink.phase_finished(phase(0))
    sink.run_finished(failed())
    wandb.teardown()  # its service writes the last row when it likes
    file = wandb_file.read(next(Path(started["dir"]).glob("*.wandb")))
    ((title, text),) = file["alerts"]
    assert title == "kvpipe tiny failed"
    assert text.splitlines() == [
        "generate_result_after_kv_rebuild: the check 'same output' failed",
        "same output: first differing token at index 2",
    ]


def test_an_alert_reaches_the_server(tmp_path, server):
    sink = online(tmp_path)
    sink.start(CONFIG)
    sink.phase_finished(phase(0))
    sink.run_finished(failed())
    alerts = [body for _, body in server.requests if b"mutation NotifyScriptableRunAlert" in body]
    assert len(alerts) == 1
    assert json.loads(alerts[0])["variables"]["title"] == "kvpipe tiny failed"


def test_tables_that_the_server_never_takes_hold_the_end_up_for_its_timeout_and_are_reported(
    tmp_path, wandb_process, monkeypatch
):
    import wandb

    sink = WandbSink(TrackingConfig(finish_timeout_s=4), tmp_path, None)
    started = sink.start(CONFIG)
    sink.phase_finished(phase(0))
    hang = threading.Event()
    monkeypatch.setattr(sink, "_by_phase", hang.wait)
    with pytest.raises(TrackingError, match=r"tables of the phases: no answer in 4 s") as caught:
        sink.run_finished(passed())
    hang.set()
    assert started["dir"] in str(caught.value)
    wandb.teardown()  # its service writes the last row when it likes
    file = wandb_file.read(next(Path(started["dir"]).glob("*.wandb")))
    assert file["exit_code"] == 0


def test_the_text_files_hold_the_whole_texts_to_the_byte(offline):
    folder = f"wandb_samples/{offline.started['id']}"
    texts = {"prompt": PROMPT, "output_1": OUTPUT, "output_2": OUTPUT}
    for kind, text in texts.items():
        path = f"{folder}/{kind}_sha256_{sha256(text)}.txt"
        assert offline.uploaded(path) == (offline.run_dir / path).read_bytes() == text.encode()


def test_the_logged_config_is_the_one_that_was_given(offline):
    logged = {
        key: value for key, value in offline.file["config"].items() if not key.startswith("_wandb")
    }
    assert logged == CONFIG


def test_the_start_says_what_is_in_force_whatever_the_environment_says(offline):
    started = dict(offline.started)
    assert started.pop("id") in started.pop("dir")
    assert started == {
        "project": "kv",
        "name": "run 1",
        "url": None,
        "mode": "offline",
        "fallback": False,
        "fallback_reason": None,
    }


def test_wandb_writes_into_the_run_directory_and_nothing_to_stdout(offline):
    assert offline.sync_dir.parent == offline.run_dir / "wandb"
    assert (offline.process.stdout, offline.process.stderr) == (b"", b"")


def test_the_api_key_is_in_no_file_and_no_output(offline):
    assert files_with(KEY.encode(), offline.run_dir, offline.home) == []
    assert KEY.encode() not in offline.process.stdout + offline.process.stderr


def test_disabled_never_imports_wandb_and_writes_nothing(tmp_path):
    code = """
import sys
from pathlib import Path
from pipeline_records import passed, phase
from kvpipe.config.schema import TrackingConfig, TrackingMode
from kvpipe.sinks.wandb import WandbSink
sink = WandbSink(TrackingConfig(mode=TrackingMode.disabled), Path(sys.argv[1]), None)
assert sink.start({})["mode"] == "disabled"
sink.phase_finished(phase(8))
sink.run_finished(passed())
assert "wandb" not in sys.modules
"""
    process = python(code, str(tmp_path))
    assert (process.returncode, process.stderr) == (0, b"")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_without_wandb_init_has_no_run(tmp_path):
    sink = online(tmp_path)
    sink.run_started(started(CONFIG))
    sink.phase_started("jax_ready", 0, 1)
    sink.phase_finished(phase(1))
    sink.run_finished(passed())
    assert list(tmp_path.iterdir()) == []


def test_a_config_with_a_secret_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^prompt\.text: .* variable WANDB_API_KEY,") as caught:
        online(tmp_path).start({**CONFIG, "prompt": {"text": f"hi {KEY}", "file": None}})
    assert KEY not in str(caught.value)


def test_online_without_a_key_names_what_to_set(tmp_path):
    with pytest.raises(TrackingError, match=r"WANDB_API_KEY in the environment or in a \.env"):
        online(tmp_path, api_key=None).start(CONFIG)


def test_online_without_a_key_goes_offline_if_the_config_says_so(tmp_path, wandb_process):
    import wandb

    sink = online(tmp_path, api_key=None, fallback_offline=True)
    started = sink.start(CONFIG)
    sink.phase_finished(phase(0))
    sink.run_finished(failed())
    assert (started["mode"], started["fallback"]) == ("offline", True)
    assert "WANDB_API_KEY" in started["fallback_reason"]
    wandb.teardown()  # its service writes the last row when it likes
    file = wandb_file.read(next(Path(started["dir"]).glob("*.wandb")))
    assert (len(phase_rows(file)), file["exit_code"]) == (1, 1)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b'{"errors": [{"message": "user is not logged in"}]}', "user is not logged in"),
        (200, b"<html>It works!</html>", "invalid character '<'"),
        (200, b"{}", "answered, but is not a W&B server"),
    ],
)
def test_a_refusing_or_foreign_server_is_one_clear_message(tmp_path, server, status, body, said):
    server.respond = lambda *_: (status, body)
    with pytest.raises(TrackingError) as caught:
        online(tmp_path).start(CONFIG)
    message = str(caught.value)
    assert said in message
    assert server.url in message
    assert "\n" not in message


@pytest.mark.timeout(80)  # without the config's timeout it is W&B's own, of 90 s
def test_a_server_that_never_answers_fails_within_the_timeout(tmp_path, server):
    server.respond = wandb_server.never
    with pytest.raises(TrackingError, match="did not begin the run: Timed out"):
        online(tmp_path, init_timeout_s=2.0).start(CONFIG)


def test_no_network_is_found_out_without_waiting_for_the_timeout(tmp_path, wandb_process):
    # The port of a server that has gone: nobody listens there.
    with wandb_server.serve() as server:
        wandb_process.setenv("WANDB_BASE_URL", server.url)
    with pytest.raises(TrackingError, match="Connection refused"):
        online(tmp_path, init_timeout_s=60.0).start(CONFIG)


def test_a_wrong_setting_in_the_environment_is_named(tmp_path, wandb_process):
    wandb_process.setenv("WANDB_BASE_URL", "api.wandb.ai")
    with pytest.raises(TrackingError, match=r"W&B refuses its own settings.*base_url"):
        online(tmp_path).start(CONFIG)


def test_online_everything_reaches_the_server_and_the_key_no_file(tmp_path, server):
    sink = online(tmp_path, finish_timeout_s=20.0)
    started = sink.start(CONFIG)
    for record in pipeline():
        sink.phase_finished(record)
    sink.run_finishes(Handed(17, STEPS))
    sink.run_finished(passed())
    assert started["mode"] == "online"
    assert started["url"] == f"{server.url}/team/kvpipe/runs/{started['id']}"
    streams = [json.loads(body) for path, body in server.requests if "file_stream" in path]
    rows = [
        json.loads(line)
        for stream in streams
        for line in stream.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
    ]
    assert [row["phase/name"] for row in rows if "phase/name" in row] == STEPS
    uploads = dict(server.requests)
    folder = f"/upload/wandb_samples/{started['id']}"
    for kind, text in {"prompt": PROMPT, "output_1": OUTPUT, "output_2": OUTPUT}.items():
        assert uploads[f"{folder}/{kind}_sha256_{sha256(text)}.txt"] == text.encode()
    assert len([path for path in uploads if path.endswith(".html")]) == 3
    for secret in (KEY.encode(), base64.b64encode(f"api:{KEY}".encode())):
        assert files_with(secret, tmp_path) == []


def test_a_resumed_run_adds_its_rows_to_the_wandb_run_with_its_id(tmp_path, server):
    """W&B drops a row of a step before its last one, which is that of the earlier part's tables."""
    earlier = [started(), *pipeline()]
    tail = json.dumps([json.dumps({"_step": len(STEPS), "_runtime": 3})])
    bucket = {"id": "1", "name": "abcd1234", "displayName": "n", "historyTail": tail}
    bucket |= {"historyLineCount": 17, "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
    bucket |= {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}', "tags": []}
    there = {"id": "1", "name": "kvpipe", "entity": {"name": "team"}, "bucket": bucket}
    asked = []

    def respond(server, path, body):
        if b"RunResumeStatus" not in body:
            return wandb_server.well_behaved(server, path, body)
        asked.append(json.loads(body)["variables"]["name"])
        return wandb_server.answer(model=there)

    server.respond = respond
    tracking = TrackingConfig(mode=TrackingMode.online, id="abcd1234")
    sink = WandbSink(tracking, tmp_path, KEY, earlier)
    sink.run_started(replace(started(), skipped=["generate_result"]))
    assert sink.start(CONFIG)["id"] == "abcd1234"
    for record in pipeline():
        sink.phase_finished(record)
    sink.run_finishes(Handed(len(STEPS) + 1, STEPS))
    sink.run_finished(passed(tmp_path))
    assert asked == ["abcd1234"]
    (path,) = tmp_path.glob("wandb/run-*/*.wandb")
    file = wandb_file.read(path)
    assert file["id"] == "abcd1234"
    first = len(STEPS) + 1
    assert [row["_step"] for row in phase_rows(file)] == [*range(first, first + len(STEPS))]
    table = json.loads((path.parent / "files" / file["summary"]["phases/path"]).read_text())
    assert [row[0] for row in table["data"]] == ["generate_result", *STEPS]


def test_a_request_that_succeeds_when_repeated_is_no_loss(tmp_path, server):
    sink = online(tmp_path, finish_timeout_s=20.0)
    sink.start(CONFIG)
    refusals = [503, 500]

    def shaky(server, path, body):
        return (refusals.pop(), b"") if refusals else wandb_server.well_behaved(server, path, body)

    server.respond = shaky
    sink.phase_finished(phase(0))
    sink.run_finished(passed())
    assert refusals == []


def test_rows_that_the_server_refuses_fail_the_end_of_the_run(tmp_path, server):
    """W&B's own finish() returns as if all were well."""
    sink = online(tmp_path)
    started = sink.start(CONFIG)
    server.respond = lambda *_: (403, b"")
    for idx in range(3):
        sink.phase_finished(phase(idx))
    with pytest.raises(TrackingError) as caught:
        sink.run_finished(passed())
    assert "403" in str(caught.value)
    assert "up to 3 rows" in str(caught.value)
    assert str(caught.value).endswith(f"wandb sync {started['dir']}")


def test_a_server_that_is_lost_ends_the_run_within_the_timeout(tmp_path, server):
    sink = online(tmp_path, finish_timeout_s=2.0)
    sink.start(CONFIG)
    sink.phase_finished(phase(0))
    server.respond = wandb_server.never
    # Without the timeout it would never end.
    with pytest.raises(TrackingError, match="did not finish the run: Timed out"):
        sink.run_finished(passed())


def test_a_killed_service_is_loud_and_the_next_run_of_the_process_works(tmp_path, wandb_process):
    """wandb.teardown() answers a dead service with sys.exit."""
    for name in ("first", "second"):
        sink = WandbSink(TrackingConfig(), tmp_path / name, None)
        (tmp_path / name).mkdir()
        started = sink.start(CONFIG)
        sink.phase_finished(phase(0))
        if name == "second":
            sink.run_finished(passed())
        assert names_once_written(started["dir"]) == ["wandb_init"]
        if name == "first":
            kill_wandb_service()
            with pytest.raises(TrackingError, match="did not take the row of 'jax_ready'"):
                sink.phase_finished(phase(1))
            with pytest.raises(TrackingError, match="up to 2 rows may be missing"):
                sink.run_finished(passed())


@pytest.mark.timeout(60)  # without the limit it would never end
def test_a_service_that_does_not_start_is_named_within_the_limit_and_the_next_run_has_one(tmp_path):
    """wandb took a lock that it held, so that its start, and each later one, waited for ever.

    In a process of its own, because a run's is new to wandb.
    """
    home = {"HOME": str(tmp_path)}
    done = python(HANGING_START, str(tmp_path), str(STUCK_SERVICE), json.dumps(CONFIG), **home)
    assert done.returncode == 0, done.stderr.decode()
    (hung, failed_at_once, then), left = json.loads(done.stdout.splitlines()[-1])
    begun = "tracking.mode=offline: W&B did not begin the run: no answer in 5.1 s; check "
    assert hung.startswith(f"{begun}tracking.init_timeout_s and the free space of {tmp_path}")
    assert hung.endswith("or set tracking.mode=disabled")
    assert failed_at_once == "W&B's service did not start: wandb-core exited with code 1"
    assert then == "offline"
    assert left == []


def test_a_service_that_hangs_later_is_named_with_the_row_and_not_waited_for_again(
    tmp_path, wandb_process
):
    sink = WandbSink(TrackingConfig(log_timeout_s=20), tmp_path, None)
    sink.start(CONFIG)
    sink.phase_finished(phase(0))
    sink._tracking = TrackingConfig(log_timeout_s=0.5)
    (service,) = services()
    suspend(service)
    try:
        said = r"the row of 'jax_ready': no answer in 0\.5 s; up to 2"
        with pytest.raises(TrackingError, match=said):
            sink.phase_finished(phase(1))
        sink.run_finished(failed())
        assert services() == []
    finally:
        with suppress(psutil.NoSuchProcess):
            service.kill()


def services():
    children = psutil.Process().children()
    return [child for child in children if child.name().startswith("wandb-core")]


def names_once_written(directory):
    """Return the phases of the rows in W&B's file; its service holds them back for a while."""
    deadline = time.monotonic() + 60
    while True:
        file = wandb_file.read(next(Path(directory).glob("*.wandb")))
        named = [row["phase/name"] for row in file["history"] if "phase/name" in row]
        if named or time.monotonic() > deadline:
            return named
        time.sleep(0.1)


def kill_wandb_service():
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb-core"):
            child.kill()
            child.wait()
