import errno
import fcntl
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kvpipe.checkpoints import model_dir, tiny
from kvpipe.cli import run
from kvpipe.config.schema import (
    Kvpipe,
    ModelConfig,
    TinyModel,
    TrackingConfig,
    TrackingMode,
    from_plain,
)
from kvpipe.errors import TrackingError
from kvpipe.parent import supervisor
from kvpipe.sweeps.group import grouped
from kvpipe.system.lock import Lock
from tests import command
from tests.in_process import Answer, files
from tests.refusal import refusal
from tests.sinks.pipeline_records import passed


def test_another_platform_in_the_environment_is_refused_by_a_run(kvpipe, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert kvpipe() == Answer(
        2,
        "",
        "kvpipe: engine.device is 'cpu', but the environment has JAX_PLATFORMS=tpu; "
        "unset it or set it to cpu\n",
    )


def test_a_run_directory_that_cannot_be_made_is_reported_without_a_traceback(kvpipe, tmp_path):
    (tmp_path / "outputs").touch()
    answer = kvpipe()
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("kvpipe: [Errno ")
    assert answer.err.count("\n") == 1


def test_a_terminal_gets_a_table_and_a_pipe_gets_json(monkeypatch):
    from kvpipe.config.schema import OutputFormat
    from kvpipe.sinks.console import ConsoleTable
    from kvpipe.sinks.jsonl import JsonLines

    for is_a_terminal, kind in ((True, ConsoleTable), (False, JsonLines)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_a_terminal: answer)
        assert isinstance(run._screen(OutputFormat.auto), kind)
    assert isinstance(run._screen(OutputFormat.table), ConsoleTable)


def test_heartbeats_come_where_no_terminal_shows_the_run_and_can_be_turned_off(monkeypatch):
    from kvpipe.config.schema import OutputFormat

    for is_a_terminal, output, beats in (
        (False, OutputFormat.auto, 1),
        (False, OutputFormat.table, 1),
        (True, OutputFormat.json, 1),
        (True, OutputFormat.auto, 0),
        (True, OutputFormat.table, 0),
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_a_terminal: answer)
        config = Kvpipe(output=output)
        assert len(run._heartbeat(config)) == beats
        config.runner.heartbeat_s = None
        assert run._heartbeat(config) == []


@pytest.mark.parametrize(
    ("asked", "may_fall_back", "began", "fell_back", "said"),
    [
        ("offline", False, "offline", False, None),
        ("online", True, "offline", True, None),
        ("offline", False, "disabled", False, "W&B began as 'disabled', not as 'offline'"),
        ("online", True, "offline", False, "W&B began as 'offline', not as 'online'"),
        ("online", False, "offline", True, "W&B began as 'offline', not as 'online'"),
    ],
)
def test_wandb_in_another_mode_than_the_config_asks_for_fails_unless_that_fallback_is_announced(
    asked, may_fall_back, began, fell_back, said
):
    class Tracker:
        def start(self, plain):
            return {"mode": began, "fallback": fell_back}

    tracking = TrackingConfig(mode=TrackingMode(asked), fallback_offline=may_fall_back)
    config = replace(Kvpipe(), tracking=tracking)
    if said is None:
        assert run._start_tracking(Tracker(), {}, config)["mode"] == began
        return
    with pytest.raises(TrackingError, match=f"^tracking.mode={asked}: {said}$") as caught:
        run._start_tracking(Tracker(), {}, config)
    assert caught.value.exit_code == 3


def test_the_reason_of_a_failed_run_is_on_stderr_unless_a_terminal_shows_it(kvpipe, monkeypatch):
    def carry_out(self):
        return replace(passed(self.run_dir), exit_code=3, error="it cannot be done")

    monkeypatch.setattr(supervisor.Run, "carry_out", carry_out)
    reported = Answer(3, "", "kvpipe: it cannot be done\n")
    assert kvpipe() == kvpipe("output=table") == reported
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert kvpipe("output=json") == reported
    assert kvpipe() == Answer(3, "", "")


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        ("/proc/x", "cannot write in /proc/x: No such file or directory; set cache_dir to"),
        ("file/x", "cannot write in file/x: Not a directory; set"),
        ("link", "cannot write in link: File exists; set"),
        ("x" * 300, "File name too long; set cache_dir to a directory that can be written"),
        ('"~nosuch/x"', "~nosuch/x: there is no such home directory"),
    ],
)
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_started(
    kvpipe, tmp_path, cache, reason
):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nosuch")
    done = kvpipe(f"cache_dir={cache}")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("kvpipe: cache_dir: ")
    assert reason in done.err


def test_a_cache_that_cannot_be_written_will_do_if_the_model_is_in_it(monkeypatch, tmp_path):
    config = Kvpipe(model=ModelConfig("tiny", generate=TinyModel()), cache_dir=str(tmp_path))

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(model_dir.tempfile, "TemporaryFile", read_only)
    assert "Read-only file system" in refusal(model_dir.check_cache_dir, config)
    tiny.directory_of(config.model.generate, tmp_path).mkdir()
    model_dir.check_cache_dir(config)


@pytest.mark.parametrize(
    "given",
    [
        "phases.generate_result.max_new_token=8",
        "phases.weights_swapped_from_mllm.probe_token=8",
        "phases.generate_result.hf_token=hf_eight",
    ],
)
def test_a_number_that_a_misspelled_option_has_is_no_secret(kvpipe, given):
    step, option = given.removeprefix("phases.").partition("=")[0].split(".")
    done = kvpipe(given)
    meant = {"max_new_token": "max_new_tokens", "probe_token": "probe_tokens"}.get(option)
    reported = f"{option!r}; did you mean {meant!r}?" if meant else "this looks like a secret"
    assert done.err.startswith(f"kvpipe: phases.{step}.{option}: ")
    assert reported in done.err
    assert "hf_eight" not in done.err
    assert [path for path in files(Path.cwd()) if ".hydra" in path] == []


def test_a_step_may_be_called_like_a_secret_and_have_a_time_limit(kvpipe, monkeypatch):
    monkeypatch.setattr(supervisor.Run, "carry_out", lambda self: passed(self.run_dir))
    own = ("pipeline.4=param_token", "++phases.param_token={use: param_dict, slot: param_dict}")
    drop = "~phases.sglang_param_dict_ready"
    done = kvpipe(*own, drop, "runner.phase_timeouts.param_token=30")
    assert "secret" not in done.err


def test_the_jobs_of_a_sweep_share_a_group_and_have_their_overrides_as_tags(kvpipe, monkeypatch):
    begun = []

    def carry_out(self):
        assert self.plain["tracking"]["group"] == self.config.tracking.group
        begun.append(self.config.tracking)
        finished = passed(self.run_dir)
        self.sinks.run_finished(finished)
        return finished

    monkeypatch.setattr(supervisor.Run, "carry_out", carry_out)
    sweep = ["-m", "+experiment=tiny", "engine.max_total_tokens=512,1024"]
    for arguments in ([], ["tracking.group=mine", "tracking.tags=[a]"]):
        assert kvpipe(*sweep, *arguments).code == 0
    groups = [tracking.group for tracking in begun]
    assert groups[0] == groups[1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}", groups[0])
    assert groups[2:] == ["mine", "mine"]
    assert begun[0].tags == ["+experiment=tiny", "engine.max_total_tokens=512"]
    assert begun[-1].tags[0] == "a"
    begun.clear()
    assert kvpipe("engine.max_total_tokens=512").code == 0
    assert (begun[0].group, begun[0].tags) == (None, [])


def test_a_run_and_a_job_of_a_sweep_convert_their_config_once(kvpipe, monkeypatch):
    made = []
    monkeypatch.setattr(run, "from_plain", lambda plain: made.append(from_plain(plain)) or made[-1])
    monkeypatch.setattr(supervisor.Run, "carry_out", lambda self: passed(self.run_dir))
    assert kvpipe("engine.max_total_tokens=512").code == 0
    assert len(made) == 1
    kvpipe("-m", "engine.max_total_tokens=512,1024")
    assert [config.engine.max_total_tokens for config in made[1:]] == [512, 1024]


def test_tags_that_are_no_texts_are_refused_in_a_sweep_too(kvpipe):
    answer = kvpipe("-m", "engine.max_total_tokens=512", "tracking.tags=[[a]]")
    assert "kvpipe: tracking.tags: ['a'] is of type list, not str\n" in answer.err


def test_an_override_that_is_too_long_for_a_tag_is_left_out():
    plain = {"tracking": {"group": None, "tags": []}}
    tracking = grouped(plain, "multirun/x", ["a=1", "b=" + 63 * "x"])["tracking"]
    assert tracking == {"group": "x", "tags": ["a=1"]}


def test_a_run_that_is_refused_writes_no_records_and_starts_no_engine(tmp_path):
    done = command.kvpipe(tmp_path, JAX_PLATFORMS="tpu")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("kvpipe: engine.device is 'cpu', but the environment has ")
    assert files(tmp_path) == []


def begin_only(monkeypatch):
    """Let each run end as soon as it has begun; return the directories of those that began."""
    begun = []

    def carry_out(self):
        begun.append(self.run_dir)
        finished = passed(self.run_dir)
        self.sinks.run_finished(finished)
        return finished

    monkeypatch.setattr(supervisor.Run, "carry_out", carry_out)
    return begun


def test_runs_of_one_second_have_directories_of_their_own_with_their_configs(kvpipe, monkeypatch):
    begun = begin_only(monkeypatch)
    for tokens in (512, 1024, 512):
        assert kvpipe(f"engine.max_total_tokens={tokens}").code == 0
    assert len(set(begun)) == 3
    written = [OmegaConf.load(path / ".hydra/config.yaml") for path in begun]
    assert [config.engine.max_total_tokens for config in written] == [512, 1024, 512]
    assert files(begun[0])[:4] == [
        ".hydra",
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
    ]
    assert OmegaConf.load(begun[0] / ".hydra/overrides.yaml") == ["engine.max_total_tokens=512"]


def test_a_second_run_in_a_directory_is_refused_and_changes_nothing_there(
    kvpipe, monkeypatch, tmp_path
):
    begun = begin_only(monkeypatch)
    again = ["engine.max_total_tokens=512", "hydra.run.dir=mine"]
    assert kvpipe("hydra.run.dir=mine").code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = kvpipe(*again)
    assert (refused.code, refused.out, len(begun)) == (2, "", 1)
    why = f"kvpipe: hydra.run.dir: {tmp_path}/mine/records.jsonl belongs to an earlier run"
    assert refused.err.startswith(why)
    assert {path: path.read_bytes() for path in before} == before
    assert kvpipe(*again, "runner.overwrite=true").code == 0
    assert OmegaConf.load("mine/.hydra/config.yaml").engine.max_total_tokens == 512


def test_a_refused_run_leaves_an_empty_directory_that_it_did_not_make(kvpipe, tmp_path):
    (tmp_path / "mine").mkdir()
    for directory in ("mine", "new/one"):
        assert kvpipe(f"hydra.run.dir={directory}", "prompt.text=").code == 2
    assert files(tmp_path) == ["mine"]


def test_a_sweep_owns_its_directory_and_does_not_overwrite_an_earlier_one(
    kvpipe, monkeypatch, tmp_path
):
    begun = begin_only(monkeypatch)
    sweep = ["-m", "engine.max_total_tokens=512,1024", "hydra.sweep.dir=mine"]
    assert kvpipe(*sweep).code == 0
    again = kvpipe(*sweep)
    assert (again.code, again.out, len(begun)) == (2, "", 2)
    assert again.err.startswith(f"kvpipe: hydra.sweep.dir: {tmp_path}/mine has the jobs of an ")
    assert kvpipe(*sweep, "runner.overwrite=true").code == 0
    assert len(begun) == 4
    lock = Lock(tmp_path / "mine/run.lock", "hydra.sweep.dir")
    lock.acquire()
    in_use = kvpipe(*sweep, "runner.overwrite=true")
    lock.release()
    assert (in_use.code, len(begun)) == (2, 4)
    assert f"mine is in use by another run (process {os.getpid()} on " in in_use.err
    assert not (tmp_path / "mine/run.lock").exists()


def test_a_sweep_on_a_file_system_without_locks_says_so(kvpipe, monkeypatch, tmp_path):
    def no_locks(file, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    begun = begin_only(monkeypatch)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    swept = kvpipe("-m", "engine.max_total_tokens=512,1024", "hydra.sweep.dir=mine")
    assert (swept.code, len(begun)) == (0, 2)
    assert swept.err.splitlines()[0] == (
        f"kvpipe: {tmp_path}/mine is on a file system without file locks, so nothing keeps a second "
        "sweep out of it"
    )
