import os
import re
import shutil
import subprocess

import pytest

from kvpipe.config.schema import ComparePlansConfig
from kvpipe.parent import revisions
from tests.command import kvpipe
from tests.helpers_config import EXPERIMENTS, ROOT
from tests.refusal import refusal

PACKAGES = ("kvpipe", "phases", "conf")


def git(repository, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=repository, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with the files of this one, committed, and the working directory in it."""
    folder = tmp_path / "repository"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    git(folder, "-c", "init.defaultBranch=main", "init", "-q")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "base")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def sides(tmp_path):
    """The two sides of a comparison, unpacked in a folder of their own."""

    def found(common=(), config_dir=None, **config):
        scratch = tmp_path / "scratch"
        return revisions.sides(ComparePlansConfig(**config), common, config_dir, scratch)

    return found


def test_without_a_revision_the_files_here_are_compared_with_head(repository, sides):
    before, after = sides()
    assert before.name == f"HEAD ({git(repository, 'rev-parse', '--short=7', 'HEAD')})"
    assert (after.name, after.root) == ("the files here", ROOT)
    assert before.experiments() == after.experiments() == EXPERIMENTS


def test_overrides_alone_are_compared_with_the_files_here_without_them(sides):
    before, after = sides(["+experiment=tiny"], overrides=["engine.page_size=16"])
    assert before.root == after.root == ROOT
    assert (before.name, after.name) == (
        "the files here",
        "the files here with `engine.page_size=16`",
    )
    assert list(before.arguments) == ["+experiment=tiny"]
    assert list(after.arguments) == ["+experiment=tiny", "engine.page_size=16"]


def test_a_directory_of_ones_own_configs_is_on_both_sides(sides):
    for side in sides(["a=b"], config_dir="mine", base=None, overrides=["c=d"]):
        assert list(side.arguments[:3]) == ["--config-dir", "mine", "a=b"]


def test_two_revisions_are_unpacked_and_the_work_tree_is_left_alone(repository, sides):
    git(repository, "checkout", "-q", "-b", "other")
    (repository / "conf/experiment/tiny.yaml").unlink()
    git(repository, "commit", "-q", "-a", "-m", "no tiny")
    (repository / "conf/experiment/dirty.yaml").touch()
    status = git(repository, "status", "--porcelain")
    before, after = sides(base="main", head="other")
    assert set(before.experiments()) - set(after.experiments()) == {"tiny"}
    assert "dirty" not in after.experiments()
    assert {path.name for path in after.root.iterdir()} == set(PACKAGES)
    assert git(repository, "status", "--porcelain") == status
    assert git(repository, "rev-parse", "--abbrev-ref", "HEAD") == "other"


@pytest.mark.parametrize("name", ["nosuch", "--help", "HEAD~99"])
def test_a_revision_that_does_not_exist_is_refused_by_its_name(repository, sides, name):
    missing = f"{repository} has no revision {name!r}; right are a commit, a tag or a branch that"
    assert refusal(sides, base=name).startswith(f"compare_plans.base: {missing}")
    assert refusal(sides, base="main", head=name).startswith(f"compare_plans.head: {missing}")


def test_a_directory_without_a_repository_is_refused(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    said = refusal(sides, base="nosuch")
    assert said.startswith(
        f"compare_plans.base is 'nosuch', a git revision, but {tmp_path} is in no git repository ("
    )
    assert "run this in a clone of kvpipe, or leave compare_plans.base out" in said


def test_a_git_that_hangs_is_ended_within_the_limit(tmp_path, monkeypatch, request):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    call = request.getfixturevalue("kvpipe")
    answer = call("compare-plans", "compare_plans.base=HEAD", "plan.timeout_s=0.2")
    assert (answer.code, answer.out) == (5, "")
    assert answer.err == "kvpipe: git took longer than plan.timeout_s = 0.2 s\n"


def test_a_repository_of_something_else_is_refused(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "other")
    said = refusal(sides, head="HEAD")
    assert said.startswith(
        f"compare_plans.head is 'HEAD', but {tmp_path} does not have kvpipe's kvpipe, phases, conf "
    )
    assert said.endswith("; choose a revision of kvpipe")


@pytest.mark.nightly(finds="a revision that is planned by the code or the configs of another one")
def test_a_branch_that_doubles_the_kv_cache_is_shown_and_held_to_the_budget(repository):
    """Each revision is planned by its own code: on the branch a slot is freed two phases later."""
    git(repository, "checkout", "-q", "-b", "branch")
    experiment = repository / "conf/experiment/tiny.yaml"
    experiment.write_text(experiment.read_text() + "engine: {max_total_tokens: 4096}\n")
    for name, old, new in (
        (
            "weights_swapped_from_mllm",
            "pools={PROGRAM: Size.PROGRAM} if self.probe_tokens else {},",
            'pools={f"slot:{self.slot}": Size.PARAMS},',
        ),
        (
            "release",
            "return Effect(needs=held, removes=(*held, *map(facts.shared, self.slots)))",
            "from kvpipe.pipeline.ledger import Size\n"
            '        pools = {f"slot:{name}": Size.NOTHING for name in self.slots}\n'
            "        return Effect(needs=held, removes=held, pools=pools)",
        ),
    ):
        phase = repository / f"phases/{name}.py"
        assert old in phase.read_text()
        phase.write_text(phase.read_text().replace(old, new))
    git(repository, "commit", "-q", "-a", "-m", "change")
    grown = 3 * 2048 * 2 * 2 * 128 * 2 // 2  # layers, tokens, K and V, heads, head_dim, bf16, tp
    done = kvpipe(
        repository,
        *("compare-plans", "compare_plans.base=main", "compare_plans.head=branch"),
        *("+experiment=tiny", f"compare_plans.budget_bytes={grown - 1}"),
    )
    assert done.exit_code == 1
    assert f"tiny: the peak of a device grew by {grown:,} bytes, the budget" in done.stderr
    assert f"is {grown - 1}\n" in done.stderr
    assert "| `engine.max_total_tokens` | `2048` | `4096` |" in done.stdout
    ready = r"`engine_ready_dummy`.* \| 10,759,680 \| 13,905,408 \| \+"
    assert re.search(rf"fullest device \| {ready}{grown:,} \|", done.stdout)
    swapped = r"`weights_swapped_from_mllm`.* \| 10,759,680 \| 21,517,824 \| \+"
    assert re.search(rf"fullest device \| {swapped}", done.stdout)


def test_a_revision_that_cannot_be_planned_is_named_with_the_reason(repository, sides):
    experiment = repository / "conf/experiment/tiny.yaml"
    experiment.write_text(experiment.read_text() + "engine: {tp_sise: 2}\n")
    git(repository, "commit", "-q", "-a", "-m", "broken")
    message = refusal(sides(base="HEAD")[0].plan, ["tiny"])
    assert message.startswith("HEAD (")
    assert "cannot be planned: kvpipe: In 'experiment/tiny': engine.tp_sise: " in message
