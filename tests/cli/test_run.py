import errno
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvpipe.checkpoints import model_dir, tiny
from kvpipe.cli import run
from kvpipe.config.schema import Kvpipe, ModelConfig, TinyModel, from_plain
from kvpipe.parent import supervisor
from kvpipe.sweeps.group import grouped
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


def test_a_run_directory_that_cannot_be_made_is_told_without_a_traceback(kvpipe, tmp_path):
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


def test_the_reason_of_a_failed_run_is_on_stderr_unless_a_terminal_shows_it(kvpipe, monkeypatch):
    def carry_out(self):
        return replace(passed(self.run_dir), exit_code=3, error="it cannot be done")

    monkeypatch.setattr(supervisor.Run, "carry_out", carry_out)
    told = Answer(3, "", "kvpipe: it cannot be done\n")
    assert kvpipe() == kvpipe("output=table") == told
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert kvpipe("output=json") == told
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
        "phases.generate_result.max_new_token=many",
        "phases.weights_swapped_from_mllm.probe_token=8",
        "phases.generate_result.max_new_secret=8",
        "phases.generate_result.hf_token=8",
    ],
)
def test_an_option_that_is_misspelled_is_no_secret(kvpipe, given):
    step, option = given.removeprefix("phases.").partition("=")[0].split(".")
    done = kvpipe(given)
    meant = {"max_new_token": "max_new_tokens", "probe_token": "probe_tokens"}.get(option)
    told = f"{option!r}; did you mean {meant!r}?" if meant else "this looks like a secret"
    assert done.err.startswith(f"kvpipe: phases.{step}.{option}: ")
    assert told in done.err
    assert "many" not in done.err
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
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", groups[0])
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
    (run_dir,) = (tmp_path / "outputs/tiny").iterdir()
    assert files(run_dir) == [
        ".hydra",
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
    ]
