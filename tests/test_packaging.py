"""The set-up that a clone brings along: the lock, the Makefile, the environment script."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC_HOSTS = {"pypi.org", "files.pythonhosted.org"}


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


def find_uv():
    for candidate in ("uv", str(ROOT / ".uv/bin/uv")):
        # A pyenv shim can be there and still fail, so ask it.
        if shutil.which(candidate):
            answer = subprocess.run([candidate, "--version"], capture_output=True)
            if answer.returncode == 0:
                return candidate
    return None


def test_the_lock_names_public_hosts_only():
    lock = (ROOT / "uv.lock").read_text()
    hosts = set(re.findall(r"[a-z+]+://([^/\"\s]+)", lock))
    assert hosts == PUBLIC_HOSTS


def test_the_lock_takes_every_package_but_kvpipe_from_the_public_index():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    elsewhere = {
        package["name"]: package["source"]
        for package in packages
        if package["source"] != {"registry": "https://pypi.org/simple"}
    }
    assert elsewhere == {"kvpipe": {"editable": "."}}


def test_the_lock_matches_pyproject():
    uv = find_uv()
    if uv is None:
        pytest.skip("no uv on the PATH or in .uv/ to check the lock with")
    # A mirror that the machine is configured with is not what the lock was made from.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX"))
    }
    check = subprocess.run(
        [uv, "lock", "--check", "--offline", "--default-index", "https://pypi.org/simple"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, f"run `make lock`: {check.stderr}"


def test_the_sdist_has_what_a_contributor_needs_and_names_version_and_licence(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        about = sdist.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    wanted = re.search(r"for name in (.*?); do", (ROOT / ".ci/release-check").read_text(), re.S)
    assert set(wanted[1].replace("\\", " ").split()) <= names
    assert {"docs/guide/tpu.md", "ops/on-vm", ".github/workflows/tests.yml"} <= names
    assert not [name for name in names if name.startswith(("outputs/", ".venv/", ".uv/", "dist/"))]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nVersion: {version}\n" in about
    assert "\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\n" in about


def test_the_workflow_runs_what_is_run_by_hand():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    assert re.findall(r"^ +run: (.*)$", workflow, re.MULTILINE) == [".ci/run", "make release-check"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("arguments", [[], ["help"]], ids=["make", "make help"])
def test_make_help_is_the_default_and_lists_every_target(arguments):
    listed = re.findall(r"^  make (\S+)", make(*arguments).stdout, flags=re.MULTILINE)
    assert listed == [
        "help",
        "run",
        "plans",
        "test",
        "test-all",
        "mutants",
        "test-fast",
        "bench",
        "lint",
        "format",
        "lock",
        "release-check",
        "upstream-watch",
        "clean",
        *re.findall(r"^(tpu-\w+):", (ROOT / "ops/tpu.mk").read_text(), re.MULTILINE),
    ]


def test_make_run_passes_the_experiment_and_the_overrides_on():
    dry = make("-n", "run", "EXPERIMENT=tiny", 'ARGS=run.seed=1 "text=a b"').stdout
    assert '-m kvpipe +experiment=tiny run.seed=1 "text=a b"' in dry


def test_make_run_without_an_experiment_leaves_the_choice_to_the_config():
    assert "+experiment" not in make("-n", "run", "EXPERIMENT=").stdout


def test_a_made_environment_is_left_alone(tmp_path):
    """With the stamp in place the script returns without looking for uv or Python."""
    script = tmp_path / ".ci/env.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / ".ci/env.sh", script)
    for name in ("pyproject.toml", "uv.lock"):
        (tmp_path / name).write_text("made\n")
    calls = tmp_path / "calls"
    fake_uv = tmp_path / "bin/uv"
    fake_uv.parent.mkdir()
    fake_uv.write_text(
        f'#!/bin/sh\necho "$1" >>"{calls}"\n'
        'case "$1" in --version) echo "uv 9.9.9" ;; python) echo /usr/bin/false ;;\n'
        "sync) mkdir -p .venv/bin && : >.venv/bin/python && chmod +x .venv/bin/python ;; esac\n"
    )
    fake_uv.chmod(0o755)
    environment = {"PATH": f"{fake_uv.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def run_script():
        calls.write_text("")
        subprocess.run([script], env=environment, check=True)
        return calls.read_text().split()

    assert run_script()[-1] == "sync"
    assert run_script() == []
    (tmp_path / "uv.lock").write_text("changed\n")
    assert run_script()[-1] == "sync"


def test_without_uv_venv_and_pip_the_message_names_what_to_install(tmp_path):
    script = tmp_path / ".ci/env.sh"
    script.parent.mkdir()
    # Only the pieces that the script itself needs, and a python3 that lacks venv and pip.
    shutil.copy(ROOT / ".ci/env.sh", script)
    script.write_text(script.read_text().replace("/usr/bin/python3", "python3"))
    for name in ("pyproject.toml", "uv.lock"):
        (tmp_path / name).write_text("")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    python = tools / "python3"
    python.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 0 ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    answer = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "sudo apt install python3-venv" in answer.stderr
