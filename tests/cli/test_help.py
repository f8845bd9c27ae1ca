import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from hydra.core.config_store import ConfigStore

from kvpipe.cli.verbs import VERBS
from tests import command
from tests.helpers_config import EXPERIMENTS, compose_plain
from tests.in_process import files


@pytest.fixture(scope="module")
def shown_help(tmp_path_factory):
    """Output and side effects of ``kvpipe --help``."""
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


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kvpipe +experiment=tiny_st", ["+experiment=tiny_stream"]),
        ("kvpipe check +experiment=tiny_st", ["+experiment=tiny_stream"]),
        ("kvpipe plan  engine.max_to", ["engine.max_total_tokens="]),
        ("kvpipe tracking=o", ["tracking=offline", "tracking=online"]),
        ("kvpipe check", []),
    ],
)
def test_hydras_completion_also_completes_the_arguments_after_a_verb(tmp_path, line, found):
    done = command.kvpipe(tmp_path, "-sc", "query=bash", COMP_LINE=line)
    assert (done.exit_code, done.stderr, done.stdout.split()) == (0, "", found)
    assert files(tmp_path) == []


def test_bash_completes_the_command_as_the_help_says(tmp_path, shown_help):
    (install,) = re.findall(r'eval "\$\(kvpipe -sc install=bash\)"', shown_help.stdout)
    typed = "kvpipe check +experiment=tiny_st"
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
