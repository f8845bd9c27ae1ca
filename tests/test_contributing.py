"""The phase of CONTRIBUTING.md in a copy of the sources: checked, linted, and run with all others.

The runs are the whole procedure in float32 and compare its ids with those of transformers.
"""

import re
import shutil
import subprocess
import sys

import pytest

from tests.command import kvpipe
from tests.conftest import SIZES
from tests.golden.answers import comparable, golden
from tests.helpers_config import ROOT, default_names
from tests.sop import STEPS
from tests.test_readme import CONTRIBUTING, named_files
from tests.test_run import QUIET


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with the phase, and its line of YAML, of CONTRIBUTING.md."""
    copy = tmp_path_factory.mktemp("tree")
    for package in ("kvpipe", "phases", "conf"):
        shutil.copytree(ROOT / package, copy / package)
    shutil.copy(ROOT / "pyproject.toml", copy)
    ((name, source),) = named_files(CONTRIBUTING, "python").items()
    (copy / name).write_text(source)
    (lines,) = re.findall(r"^```yaml\n(.*?)^```", CONTRIBUTING, re.S | re.M)
    before, _ = lines.splitlines(keepends=True)
    pipeline = copy / "conf/pipeline/drop_rebuild.yaml"
    assert pipeline.read_text().count(before) == 1
    pipeline.write_text(pipeline.read_text().replace(before, lines))
    (copy / "conf/model/own.yaml").write_text("id: mine/Own-1B\n")
    configs = copy / "conf/model/configs"
    shutil.copy(configs / "qwen2.5-3b-instruct.json", configs / "own-1b.json")
    return copy


def test_the_phase_in_contributing_passes_the_check_and_the_linter(tree):
    done = kvpipe(tree, "check", site=tree)
    steps = len(default_names()) + 1
    assert (done.stdout, done.stderr) == (f"tiny: {steps} steps, their order holds\n", "")
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        linted = subprocess.run([*ruff, *command, "phases"], cwd=tree, capture_output=True)
        assert linted.returncode == 0, linted.stdout


def test_the_order_of_the_phase_in_contributing_is_checked(tree):
    rebuilt = default_names().index("kv_cache_rebuilt")
    exchanged = (f"pipeline.{rebuilt}=kv_cache_is_zero", f"pipeline.{rebuilt + 1}=kv_cache_rebuilt")
    done = kvpipe(tree, "check", *exchanged, site=tree)
    assert done.exit_code == 2
    assert "'kv_cache_is_zero' needs the KV cache on the devices" in done.stderr


def test_a_model_takes_one_file_of_yaml_and_its_config_json(tree):
    assert kvpipe(tree, "check", "model=own", site=tree).exit_code == 0


# The first tier runs the procedure at tp 2 for README.md and at tp 4 from the wheel.
FINDS = "a leaf that one or two devices alone misplace in float32, or a step that a guide adds"


@pytest.fixture(scope="module", params=[2, 1], ids="tp {}".format)
def run(request, tree, tmp_path_factory):
    """The procedure with that phase, at other tensor parallel sizes than that of tests/test_run.py."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    float32 = ("engine.dtype=float32", "model.generate.torch_dtype=float32")
    size = (*SIZES, f"engine.tp_size={request.param}")
    return request.param, kvpipe(cwd, "+experiment=tiny", *size, QUIET, *float32, site=tree)


@pytest.mark.slow
@pytest.mark.nightly(finds=FINDS)
def test_at_other_tensor_parallel_sizes_the_procedure_gives_the_ids_of_transformers(run):
    tp_size, done = run
    assert (done.exit_code, done.stderr, done.end["status"]) == (0, "", "passed")
    assert [line["phase"] for line in done.lines if line["phase"] in STEPS] == STEPS
    ready = done.phase("engine_ready_dummy")
    assert len(ready["memory"]["jax_device_memory_stats"]) == tp_size
    answer = next(a for a in golden("tiny_float32")["answers"] if a["prompt"] == "Hello")
    for step in ("generate_result", "generate_result_after_kv_rebuild"):
        assert done.phase(step)["token_ids"] == comparable(answer)


@pytest.mark.slow
@pytest.mark.nightly(finds=FINDS)
def test_the_phase_in_contributing_runs_on_the_engine(run):
    _, done = run
    names = [line["phase"] for line in done.lines]
    assert names[names.index("kv_cache_rebuilt") + 1] == "kv_cache_is_zero"
    (check,) = (check for check in done.end["checks"] if check["name"] == "kv_values_not_zero")
    assert (check["actual"], check["passed"]) == (0, True)
