"""The whole procedure as a user runs it: the command, its lines, its files, its exit code.

Most is asked of one run. It comes from a wheel that was built from the repository, in another
directory, with tensor parallel 4 and the KV heads replicated as on the TPU.
"""

import hashlib
import html
import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import FAKE_KEY, Finished, environment, kvpipe, programs
from tests.conftest import ONE_LAYER, SIZES
from tests.helpers_config import default_names
from tests.installed_package import install
from tests.sinks import wandb_file
from tests.sop import STEPS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARAMS = 17_863_680
# A busy machine takes longer for a phase than the time after which a line on stderr says so.
QUIET = "runner.heartbeat_s=null"
PHASE = """
from kvpipe.pipeline.facts import ENGINE, KV_LIVE
from kvpipe.pipeline.phase import Effect, Result, WorkerPhase


class Own(WorkerPhase):
    effect = Effect(needs=(ENGINE, KV_LIVE))

    def run(self, ctx):
        from kvpipe.engine import kv_cache

        return Result({"layers": len(kv_cache.buffers(ctx.engine))})
"""
SINK = """
from kvpipe.sinks import Sink


class Names(Sink):
    def __init__(self, run_dir):
        self.file = run_dir / "names.txt"

    def received(self, record):
        with self.file.open("a") as file:
            print(record.to_json()["phase"], file=file)
"""
KV = 3 * (1024 + 1) * 2 * 4 * 128 * 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this repository is installed."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)
    return site


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny experiment from the wheel, tensor parallel 4, W&B offline, JSON piped.

    It runs in the directory of a project with packages and configs of its own. Two phases and a sink
    are the user's, from a directory and from an installed package.
    """
    cwd = tmp_path_factory.mktemp("elsewhere")
    for package in ("conf", "phases", "tests"):
        (cwd / package).mkdir()
        (cwd / package / "__init__.py").write_text("raise AssertionError('executed')\n")
    (cwd / "conf/config.yaml").write_text("lr: 0.1\n")
    (cwd / "phases/generate.py").write_text("raise AssertionError('executed')\n")
    (cwd / "mine").mkdir()
    (cwd / "mine/own_kv.py").write_text(PHASE)
    packages = tmp_path_factory.mktemp("packages")
    points = {"phases": {"packed_kv": "acme:Own"}, "sinks": {"acme": "acme:Names"}}
    install(packages, "acme", {"acme.py": PHASE + SINK}, **points)
    own = (
        "phase_path=[mine]",
        "sinks=[acme]",
        "pipeline_edit.after.kv_cache_rebuilt=[own_kv,packed_kv]",
    )
    options = (*SIZES, "sampling.max_new_tokens=16", QUIET, *own)
    path = f"{installed}:{packages}"
    return kvpipe(cwd, "+experiment=tiny", *options, PYTHONPATH=path)


def step_names() -> list[str]:
    """Return the names of the steps of that run."""
    names = default_names()
    rebuilt = names.index("kv_cache_rebuilt") + 1
    return [*names[:rebuilt], "own_kv", "packed_kv", *names[rebuilt:]]


def test_the_wheel_runs_all_phases_in_order_and_passes(run: Finished) -> None:
    assert (run.exit_code, run.stderr) == (0, "")
    phases = ["run_started", "wandb_init", "run_planned", *step_names()[1:], "run_finished"]
    assert [line["phase"] for line in run.lines] == phases
    assert (run.end["status"], run.end["exit_code"], run.end["error"]) == ("passed", 0, None)
    assert all(check["passed"] for check in run.end["checks"])


def test_the_installed_wheel_is_what_ran(installed: Path, tmp_path: Path) -> None:
    where = (
        "import inspect, kvpipe; from kvpipe.system import places; "
        "from kvpipe.pipeline.phase_files import phase_class; "
        "print(kvpipe.__file__, places.CONF, inspect.getfile(phase_class('generate')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env=environment(tmp_path, installed),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(str(installed)) == 3


def test_the_wheel_has_no_package_but_kvpipe_and_all_of_conf_and_phases(installed: Path) -> None:
    """One called ``conf`` or ``phases`` would replace files of other projects that have one."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    packages = ["kvpipe", f"kvpipe-{version}.dist-info"]
    assert sorted(path.name for path in installed.iterdir()) == packages
    for name in ("conf", "phases"):
        shipped = _files_in(installed / f"kvpipe/_{name}")
        assert shipped == _files_in(ROOT / name) != []


def _files_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder) for path in files if "__pycache__" not in path.parts)


def test_phases_and_a_sink_of_the_users_own_run_and_the_records_say_where_they_come_from(
    run: Finished,
) -> None:
    assert [run.phase(step)["layers"] for step in ("own_kv", "packed_kv")] == [3, 3]
    own = {name: at for name, at in run.lines[0]["versions"].items() if " " in name}
    digests = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in (PHASE, PHASE + SINK)]
    assert own == {
        "phase own_kv": f"{run.cwd}/mine/own_kv.py (sha256 {digests[0]})",
        "phase packed_kv": f"acme 2.1, acme:Own (sha256 {digests[1]})",
        "sink acme": f"acme 2.1, acme:Names (sha256 {digests[1]})",
    }
    page = html.unescape((run.run_dir / "report.html").read_text())
    assert all(at in page for at in own.values())
    names = [line["phase"] for line in run.lines]
    assert (run.run_dir / "names.txt").read_text().split() == names
    assert "'phase_path=[mine]'" in run.end["command"]


def test_the_records_file_holds_the_very_lines_of_stdout(run: Finished) -> None:
    assert (run.run_dir / "records.jsonl").read_text() == run.stdout
    assert run.run_dir.is_relative_to(run.cwd / "outputs" / "tiny")


def test_the_first_line_says_what_runs(run: Finished) -> None:
    first = run.lines[0]
    assert (first["experiment"], first["steps"]) == ("tiny", step_names())
    assert first["config"]["engine"]["tp_size"] == 4
    assert first["versions"]["sglang-jax"] == "0.0.2"


def test_the_run_leaves_its_report_and_its_picture(run: Finished) -> None:
    page = (run.run_dir / "report.html").read_text()
    assert ">Passed</p>" in page
    assert f"{PARAMS:,}" in page
    assert (run.run_dir / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_freed_bytes_are_the_kv_bytes_are_the_engines_own_arrays(run: Finished) -> None:
    drop = run.phase("kv_cache_dropped")["drop_info"]
    rebuild = run.phase("kv_cache_rebuilt")["rebuild_info"]
    before, after = run.phase("flush_cache_before_kv_drop"), run.phase("kv_cache_dropped")
    freed = _in_use(before) - _in_use(after)
    assert drop == {
        "fused_bytes_total": KV,
        "fused_bytes_per_layer": KV // 3,
        "deleted_buffers": 3,
        "freed_bytes": freed,
    }
    assert freed == before["ledger"]["kv"] == KV
    assert "kv" not in after["ledger"]
    assert rebuild["allocated_bytes"] == rebuild["fused_bytes_total"] == KV


def test_the_second_parameter_set_has_the_bytes_of_the_first(run: Finished) -> None:
    first = run.phase("sglang_param_dict_ready")["ledger"]
    second = run.phase("sglang_param_dict2_ready")["ledger"]
    assert first["params"] == first["slot:param_dict"] == PARAMS
    assert second["params"] == second["slot:param_dict2"] == PARAMS
    assert run.phase("after_drop_param_dict2")["ledger"].keys() == {"params", "kv", "other"}


def test_every_leaf_is_shared_and_the_swap_changed_the_output(run: Finished) -> None:
    sharing = run.phase("param_sharing_check")
    assert sharing["results"] == {"shared": 38, "apart": []}
    (changed,) = [c for c in run.end["checks"] if c["name"] == "swap_changed_output"]
    assert changed["passed"]
    assert len(changed["actual"]) == 8


def test_the_same_text_comes_after_the_rebuild(run: Finished) -> None:
    first, second = run.phase("generate_result"), run.phase("generate_result_after_kv_rebuild")
    assert second["same_output"] == 1
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) == 16
    assert len(set(first["token_ids"])) > 10
    assert first["text"] == second["text"] != ""
    assert second["text_sha256"] == first["text_sha256"] == second["text_sha256_before"]


def test_planned_bytes_are_measured_bytes_in_every_phase(run: Finished) -> None:
    plan = {phase["name"]: phase["pools"] for phase in run.phase("run_planned")["phases"]}
    measured = {line["phase"]: line for line in run.lines if line["phase"] in STEPS[2:]}
    assert len(measured) == 14
    for step, record in measured.items():
        owned = {pool: size for pool, size in record["ledger"].items() if pool != "other"}
        assert owned == plan[step]
        errors = dict(record["plan_error_bytes"])
        assert errors.pop("total") == record["ledger"].get("other", 0)
        assert set(errors.values()) == {0}
    assert run.phase("run_planned")["fit"]["fits"]


def test_after_the_first_generate_only_the_rebuild_compiles(run: Finished) -> None:
    after = STEPS.index("weights_swapped_from_mllm") + 1
    compiled = {s: programs(run.phase(s)) for s in STEPS[after:]}
    assert {step for step, count in compiled.items() if count} == {"kv_cache_rebuilt"}
    assert compiled["kv_cache_rebuilt"] == 1


def test_every_record_has_the_scripts_memory_fields_and_its_own_duration(
    run: Finished,
) -> None:
    elapsed = 0.0
    for step in STEPS:
        record = run.phase(step)
        assert record["elapsed_s"] >= elapsed
        assert 0 <= record["duration_s"] <= record["elapsed_s"]
        elapsed = record["elapsed_s"]
        memory = record["memory"]
        assert memory["process_peak_rss_bytes"] >= memory["process_rss_bytes"] * 0.9 > 0
        if step in STEPS[2:]:
            assert memory["bytes_in_use_source"] == "live_arrays"
            per_device = [stats["bytes_in_use"] for stats in memory["jax_device_memory_stats"]]
            assert len(per_device) == 4
            assert _in_use(record) == sum(per_device) == sum(record["ledger"].values())


def test_the_offline_wandb_file_holds_every_key_table_text_and_file(run: Finished) -> None:
    (path,) = run.run_dir.glob("wandb/*/*.wandb")
    logged = wandb_file.read(path)
    rows = {row["phase/name"]: row for row in logged["history"] if "phase/name" in row}
    assert list(rows) == step_names()
    dropped = rows["kv_cache_dropped"]
    assert dropped["kv/fused_bytes_total"] == KV
    assert dropped["kv/deleted_buffers"] == 3
    assert dropped["mem/jax/bytes_in_use_sum"] == _in_use(run.phase("kv_cache_dropped"))
    assert dropped["mem/jax/device3/bytes_in_use"] > 0
    assert rows["generate_result_after_kv_rebuild"]["determinism/same_output"] == 1
    summary = logged["summary"]
    assert summary["sample/output_text"] == run.phase("generate_result")["text"]
    assert summary["run/status"] == "passed"
    files_dir = path.parent / "files"
    text = run.phase("generate_result")["text"]
    for key, shown in [("prompt", "Hello"), ("output_text_1", text), ("output_text_2", text)]:
        media = files_dir / summary[f"sample_{key}/path"]
        assert summary[f"sample_{key}/_type"] == "html-file"
        assert html.unescape(media.read_text()).endswith(f"<pre>{shown}</pre>")
    table = json.loads((files_dir / summary["sample_texts/path"]).read_text())
    assert table["columns"] == ["kind", "sha256", "chars", "truncated", "text"]
    assert [row[0] for row in table["data"]] == ["prompt", "output_1", "output_2"]
    picture = files_dir / summary["memory_timeline/path"]
    assert picture.read_bytes() == (run.run_dir / "timeline.png").read_bytes()
    files = [f for f in logged["files"] if f.startswith("wandb_samples/")]
    assert len(files) == 3
    assert logged["exit_code"] == 0


def test_the_config_that_is_logged_is_the_one_that_ran(run: Finished) -> None:
    (path,) = run.run_dir.glob("wandb/*/*.wandb")
    config = wandb_file.read(path)["config"]
    ready = run.phase("engine_ready_dummy")
    assert config["engine"]["tp_size"] == ready["tp_size"] == 4
    assert config["engine"]["mem_fraction_static"] == ready["mem_fraction_static"] == 0.8
    assert config["pipeline"] == default_names()


def test_the_wandb_key_is_nowhere_in_what_the_run_left(run: Finished) -> None:
    assert FAKE_KEY not in run.stdout + run.stderr
    for path in run.cwd.rglob("*"):
        if path.is_file():
            assert FAKE_KEY.encode() not in path.read_bytes(), path


def test_the_engines_log_is_a_file_of_its_own(run: Finished) -> None:
    assert "KV Cache allocated" in (run.run_dir / "engine.log").read_text()


@pytest.mark.nightly(
    finds="a heartbeat that is silent while XLA compiles, or a wrong text that passes"
)
def test_another_output_fails_the_run_says_which_token_and_a_heart_beats_meanwhile(
    tmp_path: Path,
) -> None:
    run = kvpipe(
        tmp_path,
        "engine.tp_size=1",
        ONE_LAYER,
        "tracking.mode=disabled",
        "runner.heartbeat_s=1",
        "phases.generate_result.max_new_tokens=6",
        "phases.generate_result_after_kv_rebuild.max_new_tokens=5",
        # Programs that another test has compiled, or that LLVM does not optimize, would leave no time
        # for a beat about compiling.
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "programs"),
        XLA_FLAGS="",
    )
    assert run.exit_code == run.end["exit_code"] == 1
    assert run.end["status"] == "failed"
    failed = [check for check in run.end["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["same_output"]
    assert failed[0]["detail"] == "the same 5 tokens, then it ends 1 token early"
    assert run.phase("generate_result_after_kv_rebuild")["same_output"] == 0
    assert run.end["failing_phase"] == "generate_result_after_kv_rebuild"
    assert run.lines[-2]["phase"] == "after_drop_param_dict2", "what cleans is run all the same"
    *beats, why = run.stderr.splitlines()
    assert why.startswith("kvpipe: step 'generate_result_after_kv_rebuild': same_output: ")
    steps = len(default_names())
    heartbeat = rf"kvpipe: \d+/{steps} \w+ has run for \d+ s(: (compiling|loading|generating) .+)?"
    assert [line for line in beats if not re.fullmatch(heartbeat, line)] == []
    assert any(": compiling program " in line for line in beats)
    assert (run.run_dir / "records.jsonl").read_text() == run.stdout
    assert ">Failed, exit code 1</p>" in (run.run_dir / "report.html").read_text()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run under way, its engine just started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpipe", "engine.tp_size=1"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


def _lines_until(process: subprocess.Popen[str], phase: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["phase"] == phase:
            return
    raise AssertionError(f"the run ended before {phase}")


@pytest.mark.nightly(
    finds="a child of the engine that outlives a killed worker of the whole procedure"
)
def test_a_killed_worker_ends_in_a_failure_record_and_exit_code_3(
    started: subprocess.Popen[str],
) -> None:
    import psutil

    _lines_until(started, "engine_ready_dummy")
    (worker,) = [
        child
        for child in psutil.Process(started.pid).children()
        if "kvpipe.worker.entry" in child.cmdline()
    ]
    worker.kill()
    stdout, stderr = started.communicate(timeout=60)
    end = json.loads(stdout.splitlines()[-1])
    assert started.returncode == end["exit_code"] == 3
    assert end["status"] == "failed"
    assert "SIGKILL" in end["error"]
    assert "SIGKILL" in (Path(end["run_dir"]) / "report.html").read_text()
    assert "engine.log" in end["error"]
    assert "Traceback" not in stderr


@pytest.mark.nightly(finds="a child that outlives SIGTERM only beside a live engine")
def test_a_terminated_run_ends_its_worker_and_says_so(started: subprocess.Popen[str]) -> None:
    import psutil

    _lines_until(started, "engine_ready_dummy")
    children = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGTERM)
    stdout, _ = started.communicate(timeout=60)
    end = json.loads(stdout.splitlines()[-1])
    assert started.returncode == end["exit_code"] == 128 + signal.SIGTERM
    assert end["error"] == "SIGTERM ended the run"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def _in_use(record: dict[str, Any]) -> int:
    return record["memory"]["jax_device_memory_summary"]["bytes_in_use_sum"]
