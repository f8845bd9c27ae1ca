"""Every command in the guide is run, and what it says of names, flags and checks is so.

The blocks are run as those of README.md are (``tests/test_readme.py``), in a directory with the files
that the pages show and a run's records. In ``make test`` ``compare-plans``, which plans twice, is
checked like what needs a TPU. The operations on a TPU VM and their page are tested in ``tests/ops``;
the sweep on a cluster is run on one in ``tests/slurm``.
"""

import ast
import json
import re
import shlex

import pytest

from kvpipe.pipeline.steps import build_steps
from kvpipe.records.run import PhaseRecord
from tests.helpers_config import ROOT, compose_plain, config_of
from tests.sinks import pipeline_records
from tests.test_readme import BLOCKS as README_BLOCKS
from tests.test_readme import named_files, run_block, starts_an_engine

pytestmark = pytest.mark.early

GUIDE = ROOT / "docs/guide"
PAGES = {path.name: path.read_text() for path in sorted(GUIDE.glob("*.md"))}
BLOCKS = {
    name: re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for name, text in PAGES.items()
}
OPERATIONS = "tpu.md"
CLUSTER = "cluster.md"
RECORDS = [pipeline_records.started(), *pipeline_records.pipeline(), pipeline_records.passed()]

# The flags of the script at the SOP's commit.
FLAGS = [
    "model-id",
    "prompt",
    "prompt-file",
    "tp-size",
    "dp-size",
    "max-total-tokens",
    "max-new-tokens",
    "max-new-tokens-after-rebuild",
    "temperature",
    "check-same-output",
    "assert-same-output",
    "print-text-max-chars",
    "wandb-text-max-chars",
    "keep-param-dict",
    "verify-param-sharing",
    "mllm-param-dtype",
    "kv-drop-rebuild",
    "kv-drop-clear-jax-caches",
    "wandb",
    "wandb-project",
    "wandb-name",
    "wandb-entity",
]


def table(page, heading):
    """Return the rows of a page's table by their first cells, without backquotes there."""
    text = PAGES[page].split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()[2:]
    ]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The reader's directory: the files that the pages show, and the records of a run."""
    cwd = tmp_path_factory.mktemp("guide")
    for text in PAGES.values():
        for language in ("yaml", "json", "python"):
            for name, content in named_files(text, language).items():
                path = cwd / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
    lines = "".join(json.dumps(record.to_json()) + "\n" for record in RECORDS)
    for name in ("run.jsonl", "outputs/tiny/my_run/records.jsonl"):
        path = cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    return cwd


def test_the_blocks_are_found():
    found = {name: len(blocks) for name, blocks in BLOCKS.items()}
    assert found == {name: text.count("```bash") for name, text in PAGES.items()}
    assert sum(found.values()) >= 16
    starting = [name for name in BLOCKS for block in BLOCKS[name] if starts_an_engine(block)]
    assert starting == [CLUSTER]


def parameter(block):
    # The ready sweeps are composed by tests/test_sweep.py, each of their jobs.
    ready_sweeps = "check +sweep=" in block
    finds = "a command on a ready sweep whose words the command line refuses"
    marks = [pytest.mark.nightly(finds=finds)] if ready_sweeps else []
    return pytest.param(block, marks=marks, id=block.splitlines()[0])


@pytest.mark.parametrize(
    "block",
    [
        parameter(block)
        for name, blocks in BLOCKS.items()
        for block in blocks
        if name not in (OPERATIONS, CLUSTER) and block not in README_BLOCKS  # which are run as well
    ],
)
def test_every_command_in_the_guide_works(block, workplace):
    done = run_block(block.replace("kvpipe compare-plans", "kvpipe check"), workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout or "!" in block


@pytest.mark.nightly(
    finds="a comparison within its budget that does not say so, or does not end in 0"
)
def test_the_comparison_of_plans_in_the_guide_is_within_its_budget(workplace):
    (block,) = (b for blocks in BLOCKS.values() for b in blocks if "kvpipe compare-plans" in b)
    done = run_block(block, workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| `engine.max_total_tokens` | `2048` | `4096` |" in done.stdout


def test_the_migration_table_has_all_flags_of_the_script():
    rows = table("migration.md", "flag")
    assert sorted(shlex.split(flag.strip("`"))[0].removeprefix("--") for flag in rows) == sorted(
        FLAGS
    )
    assert len(FLAGS) == 22


def test_every_override_of_the_migration_table_is_one_that_a_run_takes():
    given = {
        flag: re.findall(r"`([^`]+)`", row[0])
        for flag, row in table("migration.md", "flag").items()
    }
    assert all(
        given[flag] or row[0].startswith("none: ")
        for flag, row in table("migration.md", "flag").items()
    )
    for overrides in (shlex.split(found[0]) for found in given.values() if found):
        plain = compose_plain("+experiment=qwen25_3b_bigkv", *overrides)
        build_steps(config_of(plain))
        for override in overrides:
            key, value = override.split("=", 1)
            node = plain
            for part in key.split("."):
                node = node[part]
            if not isinstance(node, dict | list):
                assert str(node) == value.strip('"') or (node is None and value == "null")


def test_every_key_that_the_guide_names_is_a_key():
    groups = "engine|sampling|tracking|trainer|model|plan|compare|prompts?|runner"
    plain = compose_plain("+experiment=qwen25_3b_bigkv")
    for name, text in PAGES.items():
        for key in re.findall(rf"`((?:{groups})\.[a-z_]+)\b", text):
            group, _, field = key.partition(".")
            if key == "engine.log":  # a file of the run
                continue
            assert field in plain[group], f"{name}: {key}"


MAKE_A_CHECK = {
    "Check",
    "check_equal",
    "computed",
    "freed",
    "grown",
    "same_output",
    "different_output",
}


def checks_in(path):
    """Return the names of all checks that a module makes, from its source."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    first = [c.args[0] for c in calls if getattr(c.func, "id", "") in MAKE_A_CHECK and c.args]
    return {argument.value for argument in first if isinstance(argument, ast.Constant)}


def test_every_check_is_explained_in_the_guide_or_in_the_summary_of_its_phase():
    """``kvpipe phases`` prints the summary."""
    explained = {
        name for cell in table("checks.md", "check") for name in re.findall(r"`([^`]+)`", cell)
    }
    phases = {path: checks_in(path) for path in (ROOT / "phases").glob("*.py")}
    made = set().union(*phases.values(), *map(checks_in, (ROOT / "kvpipe").rglob("*.py")))
    in_summary = {
        name
        for path, names in phases.items()
        for name in names
        if f"``{name}``" in ast.get_docstring(ast.parse(path.read_text())).partition("\n\n")[0]
    }
    by_option = {"plan/<pool>_bytes", "same_output", "same_rollout", "aa_control"}
    assert explained | in_summary == made | by_option


def test_the_guide_explains_the_fields_of_a_phases_record():
    named = {n for cell in table("reading.md", "field") for n in re.findall(r"`(\w+)`", cell)}
    record = next(r for r in RECORDS if isinstance(r, PhaseRecord))
    assert named == set(record.to_json()) - set(getattr(record, "fields", {}))


def test_every_link_leads_somewhere():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
            assert (GUIDE / link).exists(), f"{name}: {link}"
    assert set(re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"])) == set(PAGES) - {"README.md"}
    assert "(docs/guide/README.md)" in (ROOT / "README.md").read_text()


def test_the_files_that_the_guide_names_are_there():
    for name, text in PAGES.items():
        for named in re.findall(r"`((?:kvpipe|phases|conf|tests|ops|docs)/[\w/]*[\w.]*)`", text):
            if named != "conf/model/NAME.yaml":
                assert (ROOT / named).exists(), f"{name}: {named}"
