from dataclasses import fields
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode

from kvpipe.cli import check
from kvpipe.config.schema import Kvpipe
from kvpipe.pipeline.phase_files import phase_names
from kvpipe.pipeline.steps import build_steps
from kvpipe.suggest import nearest
from tests import command
from tests.helpers_config import EXPERIMENTS, compose_plain, config_of, default_names
from tests.in_process import Answer, files

STEPS = ", ".join(phase_names())


DROP = default_names().index("kv_cache_dropped")


STEPS_IN_A_FILE = (
    "for a list of steps, write '# @package _global_' and below it 'pipeline: [STEP, STEP]' into "
    "DIR/pipeline/NAME.yaml, and choose it: --config-dir DIR pipeline=NAME; to change single steps: "
    "pipeline_edit.after.STEP=NEW, pipeline_edit.before.STEP=NEW, pipeline_edit.replace.STEP=NEW, "
    "pipeline_edit.remove=STEP"
)


HEADER = "the file must begin with '# @package _global_', without a byte order mark (BOM) before it"


TOP_KEYS = ", ".join(sorted(field.name for field in fields(Kvpipe)))


def write_experiment(directory, text, group="experiment"):
    path = directory / group / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return ["--config-dir", str(directory)]


# Command line → the one line that is printed.
REFUSED = {
    "+experiment=tinny": f"there is no experiment 'tinny'; {nearest('tinny', EXPERIMENTS)}",
    "+experiment=zzz": f"there is no experiment 'zzz'; valid are: {', '.join(EXPERIMENTS)}",
    "experiment=tiny": (
        "experiment has no default to override; write +experiment=tiny; to name the run, set "
        "label=NAME"
    ),
    "++experiment=mine": (
        "experiment chooses files of conf/experiment, without '++'; to name the run, set label=NAME"
    ),
    "model=Qwen/Qwen3-4B": (
        "there is no model 'Qwen/Qwen3-4B'; valid are: qwen25_3b, qwen3_4b, tiny_qwen2; its keys "
        "are set one by one: model.id=VALUE"
    ),
    "label=": "label is '', it must be a name of 1 to 100 bytes in printable characters",
    "engine=gpu": "there is no engine 'gpu'; did you mean 'tpu' or 'cpu'?",
    "hydra/launcher=joblib": (
        "there is no hydra/launcher 'joblib'; valid are: basic, slurm, submitit_local, "
        "submitit_slurm"
    ),
    "engine=3": (
        "engine=3 chooses a file of conf/engine by its name, and a value of type int is no name; its "
        "keys are set one by one: engine.device=VALUE"
    ),
    "pipeline=null": (
        "pipeline=null chooses a file of conf/pipeline by its name, and a value of type NoneType is "
        f"no name; {STEPS_IN_A_FILE}"
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
        "pipeline=[...] chooses files of conf/pipeline, and 'nosuch' is none of them; "
        f"{STEPS_IN_A_FILE}"
    ),
    "pipeline.1=nosuch": (
        f"pipeline step 'nosuch': there is no phase 'nosuch'; valid are: {STEPS}"
    ),
    "pipeline.2=jax_ready": (
        "pipeline: 'jax_ready' occurs 2 times; give each its own name and set "
        "'phases.<name>.use: jax_ready'"
    ),
    "phases.generate_result.use=generat": (
        "pipeline step 'generate_result': there is no phase 'generat'; did you mean 'generate'?"
    ),
    "phases.generate_result.max_tokens=4": (
        "phases.generate_result.max_tokens: generate has no option 'max_tokens'; "
        "did you mean 'max_new_tokens' or 'stop_token_ids' or 'same_cached_tokens_as'?"
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
    "engine.tp_size=0": "engine.tp_size is 0, it must be at least 1",
    "engine.device=gpu": "engine.device is 'gpu'; did you mean 'tpu' or 'cpu'?",
    "sampling.temperature=hot": (
        "sampling.temperature: Value 'hot' of type 'str' could not be converted to Float"
    ),
    "tracking.mode=onlin": (
        "tracking.mode: Invalid value 'onlin', expected one of [online, offline, disabled]"
    ),
    "tracking.tags=x": "tracking.tags: it must be a list: [A, B]",
    "phase_path=[nosuch]": "phase_path: there is no directory nosuch",
    "sinks=[nosuch]": "sinks: no installed package has a sink 'nosuch'; valid are: none",
    "pipeline_edit.after.jax_redy=release": (
        "pipeline_edit.after.jax_redy: the pipeline has no step 'jax_redy'; did you mean 'jax_ready'?"
    ),
    "pipeline_edit.after.jax_ready=wandb_init": (
        "pipeline: 'wandb_init' occurs 2 times; give each its own name and set "
        "'phases.<name>.use: wandb_init'"
    ),
    "pipeline_edit.remove=jax_ready": (
        "pipeline: step 'engine_ready_dummy' needs the JAX devices, but no step before it provides "
        "it; put 'jax_ready' before it"
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
        "they must be equal"
    ),
    "runner.heartbeat_s=0": "runner.heartbeat_s is 0.0, it must be at least 1",
    "model.generate=null model.path=nowhere": "model.path: {cwd}/nowhere is not a directory",
    "model.generate=null model.path=.": "model.path: {cwd} has no config.json",
    "model.generate.head_dim=3": "model.generate.head_dim is 3, it must be even for RoPE",
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
def test_wrong_input_is_reported_in_one_line_with_exit_code_2_and_leaves_nothing(
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
def test_a_run_refuses_the_same_before_it_begins_and_leaves_nothing(kvpipe, tmp_path, line):
    checked, run = kvpipe("check", *split(line)), kvpipe(*split(line))
    assert run == checked
    assert run.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_not_utf_8_is_refused(kvpipe, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"zw\xf6lf")
    answer = kvpipe("check", "prompt.text=null", "prompt.file=latin1.txt")
    expected = "kvpipe: prompt.file: latin1.txt is not UTF-8, byte 2 is 0xf6\n"
    assert answer == Answer(2, "", expected)


def test_a_check_of_a_tpu_experiment_works_where_the_environment_says_cpu(kvpipe, monkeypatch):
    """It is a laptop on which the plan of a TPU is looked at."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert kvpipe("check", "+experiment=qwen25_3b_bigkv").code == 0


def test_an_unknown_verb_is_refused_with_the_nearest(kvpipe):
    assert kvpipe("chekc") == Answer(
        2, "", "kvpipe: there is no verb 'chekc'; did you mean 'check'?\n"
    )


def test_a_verb_that_is_not_the_first_argument_is_refused_with_its_place(kvpipe):
    expected = "kvpipe: cannot read the argument 'check': write KEY=VALUE; a verb comes first\n"
    assert kvpipe("+experiment=tiny", "check") == Answer(2, "", expected)


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


@pytest.mark.parametrize("line", ["check", "check hydra.mode=RUN"])
def test_the_config_of_a_single_run_is_composed_once(kvpipe, monkeypatch, line):
    """Hydra composes it twice, which takes a third of the time of 10,000 steps."""
    composed = []
    load = ConfigLoaderImpl._load_configuration_impl

    def counting(self, **given):
        composed.append(given["run_mode"])
        return load(self, **given)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counting)
    assert kvpipe(*line.split()).code == 0
    assert composed == [RunMode.RUN]


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
            "In 'experiment/mine': pipeline: it must be a list: [A, B]",
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
            f"In 'experiment/mine': {HEADER}",
        ),
        (
            "\ufeff# @package _global_\nengine: {tp_size: 2}\n",
            f"In 'experiment/mine': {HEADER}",
        ),
        (
            "defaults:\n  - override /pipeline: cycles\n",
            f"In 'experiment/mine': {HEADER}",
        ),
        (
            "# @package _global_\nexperiment: ../../evil\n",
            "experiment is '../../evil', it must be the name of a directory, not a path",
        ),
        (
            "# @package _global_\nexperiment: ..\n",
            "experiment is '..', it must be the name of a directory, not a path",
        ),
        (
            "# @package _global_\nexperiment: ''\n",
            "experiment is '', it must be a name of 1 to 100 bytes in printable characters",
        ),
        (
            "# @package _global_\nengine: {a\n b: ]\n",
            "{file}, line 3: not valid YAML: did not find expected ',' or '}'",
        ),
    ],
)
def test_a_defect_of_an_experiment_file_is_reported_in_one_line(kvpipe, tmp_path, text, message):
    where = write_experiment(tmp_path, text)
    message = message.replace("{file}", str(tmp_path / "experiment/mine.yaml"))
    answer = kvpipe("check", *where, "+experiment=mine")
    assert answer == Answer(2, "", f"kvpipe: {message}\n")


@pytest.mark.parametrize(
    ("group", "text", "why"),
    [
        ("pipeline", "pipeline: [jax_ready]\n", HEADER),
        ("pipeline", "", HEADER),
        ("sweep", "engine: {page_size: 16}\n", HEADER),
        (
            "trainer",
            "trainer: {dtype: float32}\n",
            "the file's keys are those of trainer, without 'trainer:' above them",
        ),
    ],
)
def test_a_file_whose_keys_are_in_the_wrong_place_says_where_they_go(
    kvpipe, tmp_path, group, text, why
):
    where = write_experiment(tmp_path, text, group)
    plus = "+" if group == "sweep" else ""
    answer = kvpipe("check", *where, f"{plus}{group}=mine")
    assert answer == Answer(2, "", f"kvpipe: In '{group}/mine': {why}\n")


def test_an_experiment_file_that_gives_no_name_gives_its_own(kvpipe, tmp_path):
    where = write_experiment(tmp_path, "# @package _global_\n")
    assert kvpipe("check", *where, "+experiment=mine") == Answer(0, accepted("mine"), "")


def test_a_sweep_checks_each_job_and_leaves_nothing(kvpipe, tmp_path):
    answer = kvpipe("check", "-m", "engine.max_total_tokens=512,1024")
    assert (answer.code, answer.out) == (0, accepted("tiny") * 2)
    assert files(tmp_path) == []


def test_a_sweep_goes_on_after_a_failed_job_and_its_exit_code_says_so(kvpipe):
    answer = kvpipe("check", "-m", "engine.tp_size=0,2")
    assert (answer.code, answer.out) == (2, accepted("tiny"))
    assert answer.err.count("kvpipe: engine.tp_size is 0, it must be at least 1\n") == 1
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
    """Errors that are no mistake of the user must not look like one."""

    def broken(composed):
        raise ValueError("a defect of kvpipe")

    monkeypatch.setattr(check, "act", broken)
    answer = kvpipe("check")
    assert (answer.code, answer.out) == (70, "")
    assert "Traceback (most recent call last):\n" in answer.err
    assert answer.err.endswith("ValueError: a defect of kvpipe\n")


def test_an_unknown_flag_is_refused_by_name_with_exit_code_2(tmp_path):
    done = command.kvpipe(tmp_path, "check", "--nosuch")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "kvpipe: error: unrecognized arguments: --nosuch"


def test_the_real_command_line_prints_an_error_on_stderr_without_a_traceback(tmp_path):
    done = command.kvpipe(tmp_path, "+experiment=tinny")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("kvpipe: there is no experiment 'tinny'; did you mean 'tiny' or ")
    assert files(tmp_path) == []
