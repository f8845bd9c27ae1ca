"""Every command in README.md is run, and what README.md says of names and codes is so.

The commands are taken from its ```bash blocks and its files from its ```yaml blocks. A block is run
unchanged, once and in one directory, after these changes and no others: a command that needs a
TPU is checked instead of run, make only prints what it would run, and the installation is replaced
by the wheel that it would build.
"""

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvpipe import errors
from kvpipe.cli.verbs import VERBS
from kvpipe.records.run import record_from_json
from kvpipe.system.secrets import wandb_api_key
from tests.command import environment
from tests.helpers_config import EXPERIMENTS, ROOT, compose_plain
from tests.sop import STEPS

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
NO_RUN = "|".join(["--help", "--cfg", *(verb for verb in VERBS if verb != "run")])
WHEEL = f"'{sys.executable}' -m hatchling build -t wheel -d '{{cwd}}/dist' >&2"


def named_files(text, language):
    """Return file name → content of the blocks of ``language`` that the text before them names."""
    found = re.findall(rf"`([\w/]+\.\w+)`:\n\n```{language}\n(.*?)^```", text, re.S | re.M)
    return dict(found)


@cache
def composed(experiment):
    return compose_plain(f"+experiment={experiment}")


def needs_tpu(experiment):
    return experiment in EXPERIMENTS and composed(experiment)["engine"]["device"] == "tpu"


def checked_on_cpu(line):
    """Return the kvpipe command of a line with the verb check if it needs a TPU."""
    runs = not re.search(rf"kvpipe ({NO_RUN})\b", line)
    if runs and any(map(needs_tpu, re.findall(r"\+experiment=(\w+)", line))):
        return line.replace("kvpipe", "kvpipe check", 1)
    return line


def printed_by_make(line):
    """Return the one command that the make target would run, after its set-up."""
    arguments = line.split()[1:]
    # What make was given that runs the tests is not for this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "ARGS"}
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    set_up, command = done.stdout.splitlines()
    assert set_up == ".ci/env.sh"
    return command.strip()


def as_run_here(line, cwd):
    """Return the line as this machine can run it; see the module's docstring."""
    if line.startswith("make "):
        command = printed_by_make(line)
        assert re.match(r"\.venv/bin/python -m (kvpipe|pytest)\b", command)
        checked = checked_on_cpu(command)
        return checked.removeprefix(".venv/bin/") if checked != command else ":"
    if line == "source .venv/bin/activate":
        return f"test -f '{ROOT}/.venv/bin/activate'"
    if line == '"$(.ci/env.sh uv)" tool install .':
        return f"(cd '{ROOT}' && {WHEEL.format(cwd=cwd)})"
    return checked_on_cpu(line)


def starts_an_engine(block):
    return any(
        re.match(rf"(python -m )?kvpipe(?! ({NO_RUN})\b)", line) and checked_on_cpu(line) == line
        for line in block.splitlines()
    )


# In the first tier SLURM's jobs are a sweep with engines, where there is a SLURM.
A_SWEEP = pytest.mark.nightly(finds="engines of one sweep's jobs that disturb each other")
# The first tier compiles the tiny model for a TPU (tests/engine/test_aot.py).
A_LARGE_PLAN = pytest.mark.nightly(finds="a plan of a large model that does not compile for a TPU")


def parameter(block):
    marks = [pytest.mark.slow] if starts_an_engine(block) else []
    if marks and re.search(r"^python -m kvpipe .*-m ", block, re.MULTILINE):
        marks.append(A_SWEEP)
    if re.search(r"^python -m kvpipe plan .*qwen", block, re.MULTILINE):
        marks.append(A_LARGE_PLAN)
    return pytest.param(block, marks=marks, id=block.splitlines()[-1])


def run_block(block, cwd):
    script = "\n".join(as_run_here(line, cwd) for line in block.splitlines())
    with_tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=cwd,
        env=environment(cwd) | with_tools,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The reader's directory, with the files that README.md shows."""
    cwd = tmp_path_factory.mktemp("readme")
    for name, content in named_files(README, "yaml").items():
        path = cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return cwd


@pytest.fixture(scope="module")
def ran(workplace):
    """Run a block there if it was not run yet; return what it left, and its runs' records."""

    @cache
    def run_once(block):
        before = set(workplace.rglob("records.jsonl"))
        done = run_block(block, workplace)
        return done, set(workplace.rglob("records.jsonl")) - before

    return run_once


def test_the_blocks_are_found_and_all_verbs_and_files_are_among_them():
    assert len(BLOCKS) == README.count("```bash") == 10
    assert sum(map(starts_an_engine, BLOCKS)) == 2
    assert list(named_files(README, "yaml")) == [
        "mine/experiment/kv_only.yaml",
        "mine/pipeline/kv_only.yaml",
    ]
    assert README.count("```") == 2 * (len(BLOCKS) + 2)


@pytest.mark.parametrize("block", [parameter(block) for block in BLOCKS])
def test_every_command_in_the_readme_works(block, ran):
    done, runs = ran(block)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bool(runs) == starts_an_engine(block)
    for records in runs:
        assert json.loads(records.read_text().splitlines()[-1])["status"] == "passed"


@pytest.mark.parametrize("block", [b for b in BLOCKS if "make " in b], ids=["local", "TPU"])
def test_make_runs_the_default_pipeline_and_the_tests(block):
    commands = [printed_by_make(line) for line in block.splitlines()]
    (parallel,) = re.findall(r"^PARALLEL := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands in (
        [
            ".venv/bin/python -m kvpipe",
            f'.venv/bin/python -m pytest {parallel} -m "not nightly"',
        ],
        [".venv/bin/python -m kvpipe +experiment=qwen25_3b_bigkv"],
    )


def test_the_env_file_that_the_readme_makes_is_one_that_is_accepted(tmp_path):
    (block,) = (b for b in BLOCKS if ".env" in b)
    assert run_block(block, tmp_path).returncode == 0
    path = tmp_path / ".env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("WANDB_API_KEY=abc\n")
    assert wandb_api_key(tmp_path, {}) == "abc"


def test_the_wheel_that_is_installed_has_the_command(ran, workplace):
    (block,) = (b for b in BLOCKS if "install" in b)
    assert ran(block)[0].returncode == 0
    (wheel,) = (workplace / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (points,) = (name for name in files.namelist() if name.endswith("entry_points.txt"))
        assert b"kvpipe = kvpipe.__main__:main" in files.read(points)


@pytest.fixture(scope="module")
def records(ran, workplace):
    """The lines that the README's command gives in a pipe."""
    (block,) = (b for b in BLOCKS if "tee run.jsonl" in b)
    assert ran(block)[0].returncode == 0
    return [json.loads(line) for line in (workplace / "run.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_checks_of_the_sop_are_those_that_the_readme_explains(records):
    checks = [check for r in records if r["phase"] in STEPS for check in r["checks"]]
    names = {re.sub(r"^plan/.*_bytes$", "plan/<pool>_bytes", check["name"]) for check in checks}
    assert set(first_column("check")) == names


def first_column(heading):
    """Return the first cells of the table with this heading, without their backquotes."""
    table = README.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    return [line.split("|")[1].strip().strip("`") for line in table.splitlines()[2:]]


def test_the_readme_lists_the_phases_of_the_sop_in_their_order():
    assert first_column("phase") == STEPS


def test_the_readme_lists_every_experiment_with_its_model_and_capacity():
    assert sorted(first_column("experiment")) == EXPERIMENTS
    for name in EXPERIMENTS:
        config = composed(name)
        (row,) = re.findall(rf"^\| `{name}` .*$", README, re.MULTILINE)
        assert f"| {config['engine']['max_total_tokens']:,} |" in row
        if needs_tpu(name):
            assert f"| {config['model']['id'].partition('/')[2]} |" in row


def test_the_readme_lists_every_exit_code():
    def codes(cls):
        return {cls.exit_code}.union(*map(codes, cls.__subclasses__()))

    used = {errors.HELD, errors.DEFECT} | codes(errors.KvpipeError)
    assert list(errors.EXIT_CODES) == [*map(str, sorted(used)), f"{errors.SIGNALLED} + n"]
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in errors.EXIT_CODES.items())
    assert f"| exit code | |\n|---|---|\n{rows}\n\n" in README


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_file_that_is_linked_or_named_is_there(text):
    linked = re.findall(r"\]\((?!https:)([^)#]+)", text)
    named = re.findall(r"`((?:kvpipe|phases|conf|tests|docs)/[\w/]*[\w.]*)`", text)
    shown = {"conf/model/NAME.yaml", *named_files(text, "python")}
    assert [name for name in {*linked, *named} - shown if not (ROOT / name).exists()] == []


def test_every_key_that_the_readme_sets_is_a_key():
    from omegaconf import OmegaConf

    config = OmegaConf.create(compose_plain())
    for key in re.findall(r"`([a-z_]+\.[a-z_.]+)=", README):
        parent, _, name = key.rpartition(".")
        assert name in OmegaConf.select(config, parent), key


def load_make_picture():
    spec = importlib.util.spec_from_file_location("make_picture", ROOT / "docs/make_picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(svg):
    """Return the lines of text of a picture: its pieces by height, then from left to right."""
    rows = {}
    for piece in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        rows.setdefault(float(piece.get("y")), []).append((float(piece.get("x")), piece.text))
    return [
        " ".join(text for _, text in sorted(rows[y])).replace("\xa0", " ").split()
        for y in sorted(rows)
    ]


@pytest.mark.slow
def test_the_picture_in_the_readme_shows_what_a_terminal_shows_today(records):
    """Its numbers are those of one run; the rest is as it is now, but for steps added since."""
    now = lines_of(load_make_picture().svg([record_from_json(record) for record in records]))
    shown = lines_of((ROOT / "docs/run.svg").read_text())
    names = [line[:1] for line in shown]
    now = [line for line in now if line[:1] in names]
    assert [line[0] for line in now if line[:1] == ["passed"]] == ["passed"]
    for lines in (now, shown):
        del lines[[line[:1] for line in lines].index(["passed"]) + 1 :]
    assert now[:2] == shown[:2]
    assert [line[:1] for line in now] == [line[:1] for line in shown]
    assert [len(line) for line in now] == [len(line) for line in shown]


def test_the_timeline_in_the_readme_is_the_one_that_the_project_draws():
    """It is of a committed run, so a change of the drawing shows as an old picture."""
    lines = (ROOT / "tests/data/tiny_runs/2048.jsonl").read_text().splitlines()
    drawn = load_make_picture().timeline_svg([record_from_json(json.loads(x)) for x in lines])
    assert (ROOT / "docs/timeline.svg").read_text() == drawn


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)$", CONTRIBUTING, re.MULTILINE))
def test_the_targets_in_contributing_are_there(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
