import re
import sys

from kvpipe.cli import run
from kvpipe.config.schema import Kvpipe, from_plain
from kvpipe.parent import supervisor
from kvpipe.sweeps.group import grouped
from tests import command
from tests.in_process import Answer, files
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
