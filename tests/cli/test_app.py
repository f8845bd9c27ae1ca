import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from kvpipe.cli import check, run
from kvpipe.cli.verbs import VERBS
from kvpipe.config.schema import Kvpipe, from_plain
from kvpipe.parent import supervisor
from kvpipe.pipeline.steps import build_steps, phase_names
from kvpipe.suggest import nearest
from kvpipe.sweeps.group import grouped
from tests import command
from tests.helpers_config import EXPERIMENTS, compose_plain, config_of, default_names
from tests.in_process import Answer, files
from tests.sinks.pipeline_records import passed

STEPS = ", ".join(phase_names())
DROP = default_names().index("kv_cache_dropped")
TOP_KEYS = ", ".join(sorted(field.name for field in fields(Kvpipe)))


def write_experiment(directory, text, group="experiment"):
    path = directory / group / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return ["--config-dir", str(directory)]


# Command line → the one line that is told.
REFUSED = {
    "+experiment=tinny": f"there is no experiment 'tinny'; {nearest('tinny', EXPERIMENTS)}",
    "+experiment=zzz": f"there is no experiment 'zzz'; valid are: {', '.join(EXPERIMENTS)}",
    "experiment=tiny": "experiment has no default to override; write +experiment=tiny",
    "engine=gpu": "there is no engine 'gpu'; did you mean 'tpu' or 'cpu'?",
    "hydra/launcher=joblib": (
        "there is no hydra/launcher 'joblib'; valid are: basic, slurm, submitit_local, "
        "submitit_slurm"
    ),
    "engine=3": (
        "engine=3 chooses a file of conf/engine by its name, and a value of type int is no name; a "
        "value goes into an experiment file"
    ),
    "pipeline=null": (
        "pipeline=null chooses a file of conf/pipeline by its name, and a value of type NoneType is "
        "no name; a value goes into an experiment file"
    ),
    "repeat.times=3": (
        "repeat.times=3: repeat is null, which the command line cannot change; write repeat with "
        "its keys (first, last, times) into an experiment file"
    ),
    "+repeat={first:jax_ready,last:jax_ready}": (
        "+repeat={first:jax_ready,last:jax_ready}: repeat is null, which the command line cannot "
        "change; write repeat with its keys (first, last, times) into an experiment file"
    ),
    "+experiment=qwen25_3b_bigkv model.generate.head_dim=8": (
        "model.generate.head_dim=8: model.generate is null, which the command line cannot change; "
        "write model.generate with its keys (seed, architecture, hidden_size, num_hidden_layers, "
        "num_attention_heads, num_key_value_heads, head_dim, intermediate_size, vocab_size, "
        "tie_word_embeddings, torch_dtype, max_position_embeddings) into an experiment file"
    ),
    "tracking.tags=[[a]]": "tracking.tags: ['a'] is of type list, not str",
    "pipeline=[jax_ready,nosuch]": (
        "pipeline=[...] chooses files of conf/pipeline, and 'nosuch' is none of them; a value goes "
        "into an experiment file"
    ),
    "pipeline.1=nosuch": (
        f"pipeline step 'nosuch': there is no phases/nosuch.py; valid are: {STEPS}"
    ),
    "pipeline.2=jax_ready": (
        "pipeline: 'jax_ready' occurs 2 times; give each its own name and set "
        "'phases.<name>.use: jax_ready'"
    ),
    "phases.generate_result.use=generat": (
        "pipeline step 'generate_result': there is no phases/generat.py; did you mean 'generate'?"
    ),
    "phases.generate_result.max_tokens=4": (
        "phases.generate_result.max_tokens: generate has no option 'max_tokens'; "
        "did you mean 'max_new_tokens' or 'same_cached_tokens_as'?"
    ),
    "phases.generate_result.max_new_tokens=five": (
        "phases.generate_result.max_new_tokens: 'five' is of type str, not int"
    ),
    "phases.generate_resul.log_text=false": (
        "phases.generate_resul: the pipeline has no step 'generate_resul'; "
        "did you mean 'generate_result' or 'generate_result_after_kv_rebuild'?"
    ),
    "phases.generate_result=3": "phases.generate_result: Cannot assign int to Dict[str, Any]",
    "enigne.tp_size=2": "enigne: there is no such key; did you mean 'engine' or 'runner'?",
    "+foo=2": f"foo: there is no such key; valid are: {TOP_KEYS}",
    "engine.tp_sise=2": (
        "engine.tp_sise: there is no such key; did you mean 'tp_size' or 'dp_size' or 'page_size'?"
    ),
    "+engine.tp_sise=2": (
        "engine.tp_sise: there is no such key; did you mean 'tp_size' or 'dp_size' or 'page_size'?"
    ),
    "hydra.run.dri=x": "hydra.run.dri: there is no such key; did you mean 'dir'?",
    "engine.tp_size=four": (
        "engine.tp_size: Value 'four' of type 'str' could not be converted to Integer"
    ),
    "engine.tp_size=0": "engine.tp_size is 0, it has to be at least 1",
    "engine.device=gpu": "engine.device is 'gpu'; did you mean 'tpu' or 'cpu'?",
    "sampling.temperature=hot": (
        "sampling.temperature: Value 'hot' of type 'str' could not be converted to Float"
    ),
    "tracking.mode=onlin": (
        "tracking.mode: Invalid value 'onlin', expected one of [online, offline, disabled]"
    ),
    "tracking.tags=x": (
        "tracking.tags: Invalid value assigned: str is not a ListConfig, list or tuple."
    ),
    "~model": "model.id: it has no value, and there is no default",
    "prompt.text=${nope}": "prompt.text: Interpolation key 'nope' not found",
    "prompt.text=Hello, world": (
        "prompt.text=Hello, world: a comma separates the values of a sweep; add -m to sweep over "
        "them, write [...] for a list, or quote a text: 'KEY=\"A, B\"'"
    ),
    "prompt.text=What's": (
        'cannot read the argument "prompt.text=What\'s"; put quotes around a value with special '
        "characters, once for the shell and once for Hydra: 'KEY=\"VALUE\"'"
    ),
    "engine.virtual_devices=4 engine.tp_size=2": (
        "engine.tp_size × engine.dp_size is 2 × 1 = 2, but engine.virtual_devices is 4; "
        "they have to be equal"
    ),
    "runner.heartbeat_s=0": "runner.heartbeat_s is 0.0, it has to be at least 1",
    "model.generate=null model.path=nowhere": "model.path: {cwd}/nowhere is not a directory",
    "model.generate=null model.path=.": "model.path: {cwd} has no config.json",
    "model.generate.head_dim=3": "model.generate.head_dim is 3, RoPE needs an even one",
    "prompt.text=null prompt.file=nowhere.txt": (
        "prompt.file: cannot read nowhere.txt: No such file or directory"
    ),
    "prompt.file=nowhere.txt": "prompt: give one of prompt.text and prompt.file, and not both",
    "prompt.text=": "prompt: prompt.text is empty",
    "prompt=sop_code prompt.sha256=abc": (
        "prompt.sha256: the prompt (pkg://conf/prompt/sop_code.txt, {sop_bytes} bytes) has "
        "a25011bf8712b7c88b7a65496b98056b95462ed9225228d72c9c1bc17a2362f0, not the expected abc"
    ),
    f"~phases.generate_result.log_text pipeline.{DROP}=flush_cache": (
        "pipeline: step 'kv_cache_rebuilt' requires the KV cache on the devices to be absent, but step "
        "'engine_ready_dummy' created it; leave the step out"
    ),
}


def split(line):
    """Return the arguments of a command line of :data:`REFUSED`; only `` KEY=`` splits."""
    first, *rest = line.split(" ")
    arguments = [first]
    for word in rest:
        if "=" in word:
            arguments.append(word)
        else:
            arguments[-1] += f" {word}"
    return arguments


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_input_is_told_in_one_line_with_exit_code_2_and_leaves_nothing(
    kvpipe, tmp_path, line
):
    import conf

    sop = Path(conf.__path__[0]) / "prompt/sop_code.txt"
    expected = REFUSED[line].replace("{cwd}", str(tmp_path))
    expected = expected.replace("{sop_bytes}", str(sop.stat().st_size))
    assert kvpipe("check", *split(line)) == Answer(2, "", f"kvpipe: {expected}\n")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        "+experiment=tinny",
        "engine.tp_size=four",
        "phases.generate_result.max_tokens=4",
        "engine.virtual_devices=4 engine.tp_size=2",
        "model.generate=null model.path=nowhere",
        "prompt.text=",
    ],
)
def test_a_run_refuses_the_same_before_it_begins_and_leaves_only_hydras_own_files(
    kvpipe, tmp_path, line
):
    checked, run = kvpipe("check", *split(line)), kvpipe(*split(line))
    assert run == checked
    assert run.code == 2
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= {"config.yaml", "hydra.yaml", "overrides.yaml"}


def test_a_prompt_that_is_not_utf_8_is_refused(kvpipe, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"zw\xf6lf")
    answer = kvpipe("check", "prompt.text=null", "prompt.file=latin1.txt")
    expected = "kvpipe: prompt.file: latin1.txt is not UTF-8, byte 2 is 0xf6\n"
    assert answer == Answer(2, "", expected)


def test_another_platform_in_the_environment_is_refused_by_a_run(kvpipe, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert kvpipe() == Answer(
        2,
        "",
        "kvpipe: engine.device is 'cpu', but the environment has JAX_PLATFORMS=tpu; "
        "unset it or set it to cpu\n",
    )


def test_a_check_of_a_tpu_experiment_works_where_the_environment_says_cpu(kvpipe, monkeypatch):
    """It is a laptop on which the plan of a TPU is looked at."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert kvpipe("check", "+experiment=qwen25_3b_bigkv").code == 0


def test_an_unknown_verb_is_refused_with_the_nearest(kvpipe):
    assert kvpipe("chekc") == Answer(
        2, "", "kvpipe: there is no verb 'chekc'; did you mean 'check'?\n"
    )


def test_a_verb_that_does_not_stand_first_is_told_where_it_has_to_stand(kvpipe):
    expected = "kvpipe: cannot read the argument 'check': write KEY=VALUE; a verb comes first\n"
    assert kvpipe("+experiment=tiny", "check") == Answer(2, "", expected)


RUNS = Path(__file__).parents[1] / "data/tiny_runs"
SMALL, LARGE = str(RUNS / "1024.jsonl"), str(RUNS / "2048.jsonl")


def run_dir(path, records=SMALL):
    path.mkdir()
    (path / "records.jsonl").write_text(Path(records).read_text())
    return path


def test_report_writes_page_and_picture_beside_the_records(kvpipe, tmp_path):
    run_dir(tmp_path / "run")
    assert kvpipe("report", "run") == Answer(0, "run/report.html\nrun/timeline.png\n", "")
    assert files(tmp_path / "run") == ["records.jsonl", "report.html", "timeline.png"]


def test_report_writes_elsewhere_if_told_to(kvpipe, tmp_path):
    (tmp_path / "here").mkdir()
    answer = kvpipe("report", SMALL, "report.dir=here")
    assert (answer.code, answer.out) == (0, "here/report.html\nhere/timeline.png\n")


def test_compare_holds_runs_against_the_first_and_its_exit_code_tells(kvpipe, tmp_path):
    grown = kvpipe("compare", SMALL, LARGE)
    assert grown.code == 1
    assert grown.out.startswith("# Runs compared\n")
    assert grown.err == (
        f"kvpipe: {LARGE}: kv grew by 3,145,728 bytes after 'engine_ready_dummy' and in 10 more, "
        "compare.budget_bytes is 0\n"
    )
    assert kvpipe("compare", LARGE, SMALL).code == 0
    assert kvpipe("compare", SMALL, LARGE, "compare.budget_bytes=3145728").code == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize(("form", "begin"), [("json", "{"), ("html", "<!DOCTYPE html>")])
def test_compare_has_a_form_for_programs_and_one_for_browsers(kvpipe, tmp_path, form, begin):
    answer = kvpipe("compare", LARGE, SMALL, f"compare.format={form}", "compare.file=out")
    assert answer == Answer(0, "", "")
    assert (tmp_path / "out").read_text().startswith(begin)


def test_a_directory_with_an_equals_sign_in_its_name_is_a_run(kvpipe, tmp_path):
    run_dir(tmp_path / "tp=4")
    assert kvpipe("compare", "tp=4", SMALL).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "report: name one directory of a run or a sweep, not 0: report DIR"),
        (
            ["report", SMALL, LARGE],
            "report: name one directory of a run or a sweep, not 2: report DIR",
        ),
        (["report", "nosuch"], "nosuch: there is no such directory or file"),
        (["report", "."], ".: there is no records.jsonl in it, so it is no run"),
        (["report", SMALL, "report.dir=nosuch"], "report.dir: there is no directory nosuch"),
        (
            ["report", SMALL, "report.dri=a"],
            "report.dri: there is no such key; did you mean 'dir'?",
        ),
        (
            ["compare", SMALL],
            "compare: name 2 to 26 run directories, not 1: compare RUN_A RUN_B",
        ),
        (
            ["compare", *[SMALL] * 27],
            "compare: name 2 to 26 run directories, not 27: compare RUN_A RUN_B",
        ),
        (["compare", SMALL, "nosuch"], "nosuch: there is no such directory or file"),
        (
            ["compare", SMALL, LARGE, "compare.format=xml"],
            "compare.format: Invalid value 'xml', expected one of [markdown, json, html]",
        ),
        (
            ["compare", SMALL, LARGE, "compare.budget_bytes=-1"],
            "compare.budget_bytes is -1, it has to be at least 0",
        ),
        (
            ["compare", LARGE, SMALL, "compare.file=no/such"],
            "compare.file: cannot write no/such: No such file or directory",
        ),
    ],
)
def test_what_report_and_compare_cannot_read_is_told_in_one_line(
    kvpipe, tmp_path, arguments, message
):
    assert kvpipe(*arguments) == Answer(2, "", f"kvpipe: {message}\n")
    assert files(tmp_path) == []


def test_a_report_that_cannot_be_written_is_told_in_one_line(kvpipe, tmp_path):
    (run_dir(tmp_path / "run") / "report.html").mkdir()
    answer = kvpipe("report", "run")
    assert answer.code == 1
    assert answer.err == "kvpipe: run/report.html: cannot write the report: Is a directory\n"


def test_a_run_directory_that_cannot_be_made_is_told_without_a_traceback(kvpipe, tmp_path):
    (tmp_path / "outputs").touch()
    answer = kvpipe()
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("kvpipe: [Errno ")
    assert answer.err.count("\n") == 1


def test_a_config_directory_that_is_not_there_is_named(kvpipe, tmp_path):
    assert kvpipe("check", "--config-dir", "nowhere") == Answer(
        2, "", f"kvpipe: Additional config directory '{tmp_path}/nowhere' not found\n"
    )


def accepted(experiment, *overrides):
    """Return what a check prints of an experiment that has the steps of these overrides."""
    steps = build_steps(config_of(compose_plain(*overrides)))
    return f"{experiment}: {len(steps)} steps, their order holds\n"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_passes_the_check_in_one_line(kvpipe, tmp_path, experiment):
    override = f"+experiment={experiment}"
    assert kvpipe("check", override) == Answer(0, accepted(experiment, override), "")
    assert files(tmp_path) == []


def test_an_experiment_of_ones_own_is_found_in_a_directory_of_ones_own(kvpipe, tmp_path):
    where = write_experiment(tmp_path, "# @package _global_\nexperiment: mine\n")
    assert kvpipe("check", *where, "+experiment=mine") == Answer(0, accepted("mine"), "")


def test_a_pipeline_of_ones_own_is_found_in_a_directory_of_ones_own(kvpipe, tmp_path):
    where = write_experiment(
        tmp_path,
        "# @package _global_\n"
        "pipeline: [jax_ready, engine_ready_dummy, it]\n"
        "phases: {it: {use: generate, weights: any}}\n",
        group="pipeline",
    )
    out = "tiny: 3 steps, their order holds\n"
    assert kvpipe("check", *where, "pipeline=mine") == Answer(0, out, "")


def test_the_experiments_of_ones_own_are_among_the_nearest(kvpipe, tmp_path):
    where = write_experiment(tmp_path, "# @package _global_\nexperiment: mine\n")
    answer = kvpipe("check", *where, "+experiment=mime")
    assert answer.err == "kvpipe: there is no experiment 'mime'; did you mean 'mine'?\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# @package _global_\nengine: {tp_sise: 2}\n",
            "In 'experiment/mine': engine.tp_sise: there is no such key; "
            "did you mean 'tp_size' or 'dp_size' or 'page_size'?",
        ),
        (
            "# @package _global_\nengine: {tp_size: four}\n",
            "In 'experiment/mine': engine.tp_size: Value 'four' of type 'str' could not be "
            "converted to Integer",
        ),
        (
            "# @package _global_\npipeline: jax_ready\n",
            "In 'experiment/mine': pipeline: Invalid value assigned: AnyNode is not a ListConfig, "
            "list or tuple.",
        ),
        (
            "# @package _global_\npipeline: [[jax_ready]]\n",
            "pipeline: ['jax_ready'] is of type list, not str",
        ),
        (
            "# @package _global_\ndefaults:\n  - override /engine: tpuu\n",
            "there is no engine 'tpuu'; did you mean 'tpu' or 'cpu'?",
        ),
        (
            "# @package _global_\ndefaults:\n  - override /engin: tpu\n",
            "In 'experiment/mine': Could not override 'engin'. No match in the defaults list.",
        ),
        (
            "engine: {tp_size: 2}\n",
            "In 'experiment/mine': experiment: Cannot convert 'DictConfig' to string: "
            "'{'engine': {'tp_size': 2}}'; the file has to begin with '# @package _global_'",
        ),
        (
            "# @package _global_\nengine: {a\n b: ]\n",
            "{file}, line 3: not valid YAML: expected ',' or '}', but got ':'",
        ),
    ],
)
def test_a_defect_of_an_experiment_file_is_told_in_one_line(kvpipe, tmp_path, text, message):
    where = write_experiment(tmp_path, text)
    message = message.replace("{file}", str(tmp_path / "experiment/mine.yaml"))
    answer = kvpipe("check", *where, "+experiment=mine")
    assert answer == Answer(2, "", f"kvpipe: {message}\n")


def test_a_sweep_checks_each_job_and_leaves_nothing(kvpipe, tmp_path):
    answer = kvpipe("check", "-m", "engine.max_total_tokens=512,1024")
    assert (answer.code, answer.out) == (0, accepted("tiny") * 2)
    assert files(tmp_path) == []


def test_a_sweep_goes_on_after_a_failed_job_and_its_exit_code_tells(kvpipe):
    answer = kvpipe("check", "-m", "engine.tp_size=0,2")
    assert (answer.code, answer.out) == (2, accepted("tiny"))
    assert answer.err.count("kvpipe: engine.tp_size is 0, it has to be at least 1\n") == 1
    assert "Error executing job" not in answer.err


def test_a_signal_ends_a_whole_sweep_and_not_only_its_current_job(kvpipe, monkeypatch):
    calls = []

    def interrupted(composed):
        calls.append(composed.engine.tp_size)
        return 130

    monkeypatch.setattr(check, "act", interrupted)
    with pytest.raises(SystemExit) as ended:
        kvpipe("check", "-m", "engine.tp_size=1,2,4")
    assert (ended.value.code, calls) == (130, [1])


def test_the_exit_code_of_a_sweep_is_the_highest_of_its_jobs(kvpipe, monkeypatch):
    monkeypatch.setattr(check, "act", lambda composed: composed.engine.tp_size)
    assert kvpipe("check", "-m", "engine.tp_size=1,3,2").code == 3


def test_an_unexpected_error_keeps_its_traceback(kvpipe, monkeypatch):
    """What is no person's mistake at the terminal must not look like one."""

    def broken(composed):
        raise ValueError("a defect of kvpipe")

    monkeypatch.setattr(check, "act", broken)
    answer = kvpipe("check")
    assert (answer.code, answer.out) == (70, "")
    assert "Traceback (most recent call last):\n" in answer.err
    assert answer.err.endswith("ValueError: a defect of kvpipe\n")


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


@pytest.fixture(scope="module")
def shown_help(tmp_path_factory):
    """What ``kvpipe --help`` leaves."""
    return command.kvpipe(tmp_path_factory.mktemp("help"), "--help")


def test_help_names_verbs_experiments_examples_and_flags_on_one_page(shown_help):
    assert (shown_help.exit_code, shown_help.stderr) == (0, "")
    lines = shown_help.stdout.splitlines()
    assert len(lines) <= 45
    # Hydra prints a group on one line; only those two may need more than one in a terminal.
    long = ("experiment: ", "pipeline: ")
    assert max(len(line) for line in lines if not line.startswith(long)) <= 100
    for verb in VERBS:
        assert any(line.startswith(f"  {verb} ") for line in lines), verb
    assert f"experiment: {', '.join(EXPERIMENTS)}" in lines
    assert sum(line.startswith("  python -m kvpipe") for line in lines) >= 2
    for flag in ("--cfg job", "--config-dir DIR", "--multirun", "--hydra-help"):
        assert flag in shown_help.stdout
    assert files(shown_help.cwd) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["check"]])
def test_hydras_store_is_not_copied(kvpipe, monkeypatch, arguments):
    """Copies of it took 1 s of the 1.7 s of ``--help``."""
    copies = []

    class Watched(dict):
        def __deepcopy__(self, memo):
            copies.append(arguments)
            return self

    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", Watched(store.repo))
    with suppress(SystemExit):
        kvpipe(*arguments)
    assert copies == []


def test_a_comparison_does_not_import_what_draws(tmp_path):
    code = (
        "import sys; from kvpipe.cli import app; code = app.main(sys.argv); "
        "sys.exit(code or any(m.split('.')[0] == 'PIL' for m in sys.modules))"
    )
    arguments = ["compare", LARGE, SMALL, "compare.format=html"]
    assert subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path).returncode == 0


def test_cfg_job_prints_the_config_and_runs_nothing(tmp_path):
    from omegaconf import OmegaConf

    done = command.kvpipe(tmp_path, "--cfg", "job", "+experiment=qwen25_3b_bigkv")
    assert (done.exit_code, done.stderr) == (0, "")
    printed = OmegaConf.to_container(OmegaConf.create(done.stdout))
    assert printed == compose_plain("+experiment=qwen25_3b_bigkv")
    assert files(tmp_path) == []


def test_the_examples_in_the_help_pass_the_check(kvpipe, shown_help):
    examples = [
        line.removeprefix("  python -m kvpipe").partition("    ")[0].split()
        for line in shown_help.stdout.splitlines()
        if line.startswith("  python -m kvpipe")
    ]
    assert len(examples) >= 2
    # What is no override is a verb or the path of a run.
    for overrides in {tuple(a for a in example if re.search("=|^-", a)) for example in examples}:
        assert kvpipe("check", *overrides).code == 0, overrides


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


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kvpipe +experiment=tiny_s", ["+experiment=tiny_stream"]),
        ("kvpipe check +experiment=tiny_s", ["+experiment=tiny_stream"]),
        ("kvpipe plan  engine.max_to", ["engine.max_total_tokens="]),
        ("kvpipe tracking=o", ["tracking=offline", "tracking=online"]),
        ("kvpipe check", []),
    ],
)
def test_hydras_completion_completes_what_stands_after_a_verb_too(tmp_path, line, found):
    done = command.kvpipe(tmp_path, "-sc", "query=bash", COMP_LINE=line)
    assert (done.exit_code, done.stderr, done.stdout.split()) == (0, "", found)
    assert files(tmp_path) == []


def test_bash_completes_the_command_as_the_help_says(tmp_path, shown_help):
    (install,) = re.findall(r'eval "\$\(kvpipe -sc install=bash\)"', shown_help.stdout)
    typed = "kvpipe check +experiment=tiny_s"
    script = f"""
{install}
COMP_LINE='{typed}' COMP_POINT={len(typed)} COMP_CWORD=2
hydra_bash_completion
echo "${{COMPREPLY[@]}}"
"""
    (tmp_path / "kvpipe").write_text(f"#!/bin/sh\nexec '{sys.executable}' -m kvpipe \"$@\"\n")
    (tmp_path / "kvpipe").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.split(), done.stderr) == (["+experiment=tiny_stream"], "")


def test_an_unknown_flag_is_refused_by_name_with_exit_code_2(tmp_path):
    done = command.kvpipe(tmp_path, "check", "--nosuch")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "kvpipe: error: unrecognized arguments: --nosuch"


def test_the_real_command_line_tells_an_error_on_stderr_without_a_traceback(tmp_path):
    done = command.kvpipe(tmp_path, "+experiment=tinny")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("kvpipe: there is no experiment 'tinny'; did you mean 'tiny' or ")
    assert files(tmp_path) == []


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
