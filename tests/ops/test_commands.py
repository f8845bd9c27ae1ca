"""The exact command lines of each target, their quoting, and the message about a missing value."""

import re
import shutil
import subprocess

import pytest

from tests.helpers_config import ROOT
from tests.ops.conftest import VM, Done, Laptop, git

TARGETS = re.findall(r"^(tpu-\w+): ##", (ROOT / "ops/tpu.mk").read_text(), re.MULTILINE)
DESCRIBE = [
    "gcloud",
    "compute",
    "tpus",
    "tpu-vm",
    "describe",
    "box",
    "--project=p-1",
    "--zone=us-x1-b",
]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "box", "--project=p-1", "--zone=us-x1-b"]
OPENSSH = ["--strict-host-key-checking=yes", "--ssh-flag=-Fops/ssh_config"]
PLINK = ["--ssh-flag=-hostkey", "--ssh-flag=SHA256:abc+/9", "--ssh-flag=-batch"]
NEEDS = {
    target: [*VM, *{"tpu-sync": ["REF"], "tpu-run": ["EXPERIMENT"]}.get(target, [])]
    for target in TARGETS
} | {"tpu-status": ["TPU", "PROJECT", "ZONE"]}
ALL = VM | {"REF": "main", "EXPERIMENT": "tiny"}


def over_ssh(command: str, worker: str = "0", host_key: list[str] = OPENSSH) -> list[str]:
    return [*SSH, f"--worker={worker}", *host_key, "--quiet", f"--command={command}"]


def in_clone(command: str, **options: object) -> list[str]:
    return over_ssh(f"cd kvpipe && ops/on-vm {command}", **options)


EXACT = [
    ("tpu-status", {}, [[*DESCRIBE, "--format=value(state,acceleratorType,health)"]]),
    ("tpu-ssh", {}, [[*SSH, "--worker=0", *OPENSSH]]),
    ("tpu-ssh", {"SSH_SUITE": "plink"}, [[*SSH, "--worker=0", *PLINK[:2]]]),
    ("tpu-ssh", {"HOSTKEY": "unpinned"}, [[*SSH, "--worker=0"]]),
    ("tpu-ssh", {"COMMAND": "date -u", "WORKER": "all"}, [over_ssh("date -u", "all")]),
    ("tpu-setup", {}, [in_clone("setup pypi")]),
    (
        "tpu-setup",
        {"ENGINE": "bd09a87", "WORKER": "0-3"},
        [in_clone("setup bd09a87", worker="0-3")],
    ),
    ("tpu-doctor", {"SSH_SUITE": "plink"}, [in_clone("doctor", host_key=PLINK)]),
    (
        "tpu-run",
        {"RUN": "r1", "ARGS": "-m engine.page_size=1,2", "WORKER": "all"},
        [
            in_clone(
                "run r1 -m engine.page_size=1,2 +experiment=tiny hydra.run.dir=outputs/r1 "
                "hydra.sweep.dir=outputs/r1",
                worker="all",
            )
        ],
    ),
    ("tpu-logs", {}, [in_clone("logs '' 40 0")]),
    ("tpu-logs", {"RUN": "r1", "TAIL": "7", "FOLLOW": "1"}, [in_clone("logs r1 7 1")]),
    ("tpu-secrets", {}, [in_clone("secrets SIZE")]),
    (
        "tpu-fetch",
        {"RUN": "r1"},
        [in_clone("pack r1"), ["tar", "-xf", "outputs/fetch.tar.part", "-C", "outputs"]],
    ),
]


@pytest.mark.parametrize(
    ("target", "values", "commands"), EXACT, ids=[f"{e[0]}-{i}" for i, e in enumerate(EXACT)]
)
def test_dry_run_prints_the_exact_commands_and_runs_none(
    laptop: Laptop, target: str, values: dict[str, str], commands: list[list[str]]
) -> None:
    done = laptop.make(target, **(ALL | values), DRY_RUN="1")
    assert (done.code, done.printed) == (0, commands), done.err
    assert laptop.calls == []


def test_every_target_is_tried_here() -> None:
    assert {entry[0] for entry in EXACT} | {"tpu-sync"} == set(TARGETS)


def test_what_is_printed_is_what_is_run(laptop: Laptop) -> None:
    """Values with spaces, quotes, dollars and newlines reach gcloud as they were typed."""
    awkward = {
        "TPU": "a'b c",
        "PROJECT": 'p"$HOME"',
        "ZONE": "$(touch oops) `x`\\",
        "COMMAND": "echo \"$0\"; a='b c' \n true",
    }
    done = laptop.make("tpu-ssh", **(VM | awkward))
    assert done.code == 0, done.err
    expected = [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh"],
        awkward["TPU"],
        f"--project={awkward['PROJECT']}",
        f"--zone={awkward['ZONE']}",
        "--worker=0",
        *OPENSSH,
        "--quiet",
        f"--command={awkward['COMMAND']}",
    ]
    assert done.printed == laptop.argvs == [expected]
    assert not list(laptop.clone.glob("**/oops"))


def test_overrides_reach_kvpipe_on_the_vm_word_by_word(vm: Laptop) -> None:
    (vm.worker(0) / "kvpipe/may_end").touch()
    args = """'prompt.text="it'"'"'s $5"' sampling.max_new_tokens=4"""
    assert vm.make("tpu-run", **ALL, RUN="r1", ARGS=args).code == 0
    vm.make("tpu-logs", **VM, FOLLOW="1")
    records = vm.worker(0) / "kvpipe/outputs/r1/records.jsonl"
    assert records.read_text() == (
        """<-m><kvpipe><prompt.text="it's $5"><sampling.max_new_tokens=4><+experiment=tiny>"""
        "<hydra.run.dir=outputs/r1><hydra.sweep.dir=outputs/r1>"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_value_ends_in_one_message_that_names_it(laptop: Laptop, target: str) -> None:
    for name in NEEDS[target]:
        done = laptop.make(target, **{k: v for k, v in ALL.items() if k != name})
        assert done.code != 0
        (message,) = (line for line in done.err.splitlines() if not line.startswith("make: "))
        assert re.fullmatch(rf"{target}: missing: {name} \([^;]+\)", message)
    assert laptop.calls == []


def test_all_missing_values_are_named_at_once(laptop: Laptop) -> None:
    assert (
        "missing: TPU (the name of the TPU VM, or user@name); PROJECT ("
        in laptop.make("tpu-ssh").err
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"HOSTKEY": "abc"}, "HOSTKEY has 'abc'; a fingerprint is SHA256:..."),
        ({"HOSTKEY": "SHA256:ab -oProxyCommand=x"}, "HOSTKEY has '-oProxyCommand=x'"),
        ({"SSH_SUITE": "putty"}, "SSH_SUITE is 'putty'; valid are openssh and plink"),
        ({"RUN": "../x"}, "RUN is '../x'; it takes letters, digits"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_runs(
    laptop: Laptop, values: dict[str, str], message: str
) -> None:
    done = laptop.make("tpu-run", **(ALL | values))
    assert done.code != 0
    assert message in done.err
    assert laptop.calls == []


@pytest.mark.parametrize("target", ["tpu-secrets", "tpu-fetch"])
def test_what_has_a_stream_for_each_worker_takes_no_range(laptop: Laptop, target: str) -> None:
    done = laptop.make(target, **VM, WORKER="0-1", stdin="A=b\n")
    assert done.code != 0
    assert "WORKER is '0-1'; this takes one number, or all" in done.err


def test_status_is_zero_for_ready_alone(laptop: Laptop) -> None:
    done = laptop.make("tpu-status", **(VM | {"TPU": "root@box"}))
    assert (done.code, done.out) == (0, "box is READY (v4-8, HEALTHY)\n")
    (laptop.stand_in / "state").write_text("PREEMPTED\tv4-8")
    done = laptop.make("tpu-status", **VM)
    assert (done.code != 0, done.out) == (True, "box is PREEMPTED, not READY (v4-8)\n")
    (laptop.stand_in / "state").unlink()
    done = laptop.make("tpu-status", **VM)
    assert done.code != 0
    assert "NOT_FOUND" in done.err


def known_host(fingerprint: str, pinned: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", ROOT / "ops/known-host", "tpu.1-0", "ssh-ed25519", "AAAA", fingerprint],
        env={"HOSTKEY": pinned},
        capture_output=True,
        text=True,
    )


def test_ssh_accepts_the_pinned_key_and_no_other() -> None:
    right = known_host("SHA256:b", "SHA256:a SHA256:b")
    assert (right.returncode, right.stdout) == (0, "tpu.1-0 ssh-ed25519 AAAA\n")
    wrong = known_host("SHA256:c", "SHA256:a SHA256:b")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "the VM's SSH host key is SHA256:c, HOSTKEY is SHA256:a SHA256:b" in wrong.stderr
    before_a_key_is_seen = known_host("NONE", "SHA256:a")
    assert (before_a_key_is_seen.returncode, before_a_key_is_seen.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH here")
def test_openssh_takes_the_pin_beside_the_options_that_gcloud_gives_before_it(
    laptop: Laptop,
) -> None:
    """``ssh -G`` prints what ssh would do: the command that pins is in force."""
    gclouds = ["-o", "UserKnownHostsFile=/known", "-o", "StrictHostKeyChecking=yes"]
    reported = subprocess.run(
        ["ssh", "-G", *gclouds, "-Fops/ssh_config", "root@192.0.2.1"],
        cwd=laptop.clone,
        env=laptop.environment | {"KVPIPE_OPS": str(laptop.clone / "ops")},
        capture_output=True,
        text=True,
    )
    assert reported.returncode == 0, reported.stderr
    assert "userknownhostsfile /known" in reported.stdout
    assert "stricthostkeychecking true" in reported.stdout
    assert "knownhostscommand /bin/sh" in reported.stdout


def test_the_scripts_are_ones_that_the_strictest_shell_takes() -> None:
    for name in ("tpu", "on-vm", "known-host"):
        checked = subprocess.run(["sh", "-n", ROOT / "ops" / name], capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_the_operations_contain_no_account() -> None:
    """Every value is the caller's: no project, zone, name or key is in a default."""
    text = "".join((ROOT / "ops" / n).read_text() for n in ("tpu.mk", "tpu", "on-vm"))
    assert re.findall(r"SHA256:[A-Za-z0-9+/]{43}", text) == []
    for name in ("TPU", "PROJECT", "ZONE", "HOSTKEY"):
        assert re.findall(rf"\b{name}=\${{{name}:-[^}}]", text) == []
        assert re.findall(rf"^{name}\s*\??=", text, re.MULTILINE) == []


def sync(laptop: Laptop, **values: str) -> Done:
    return laptop.make("tpu-sync", **VM, REF=values.pop("REF", "main"), **values)


def test_sync_clones_first_and_then_puts_the_clone_at_the_pushed_commit(laptop: Laptop) -> None:
    first = git(laptop.clone, "rev-parse", "HEAD")
    done = sync(laptop, WORKER="all")
    assert done.code == 0, done.err
    on_vm = [laptop.worker(index) / "kvpipe" for index in (0, 1)]
    assert [git(clone, "rev-parse", "HEAD") for clone in on_vm] == [first, first]

    (on_vm[0] / "Makefile").write_text("edited on the VM")
    (on_vm[0] / ".env").write_text("KEY=1")
    (on_vm[0] / "mine.yaml").write_text("a: 1")
    git(laptop.clone, "commit", "--quiet", "--allow-empty", "-m", "second")
    git(laptop.clone, "push", "--quiet", "origin", "main")
    done = sync(laptop)
    assert done.code == 0, done.err
    assert git(on_vm[0], "log", "-1", "--format=%s") == "second"
    assert "edited" not in (on_vm[0] / "Makefile").read_text()
    assert (on_vm[0] / ".env").read_text() == "KEY=1"
    assert "?? mine.yaml" in done.out


def test_sync_prints_its_commands_and_sends_one_to_the_vm(laptop: Laptop) -> None:
    commit = git(laptop.clone, "rev-parse", "HEAD")
    url = git(laptop.clone, "remote", "get-url", "origin")
    asked, sent = sync(laptop, DRY_RUN="1").printed
    assert asked == [
        "git",
        "ls-remote",
        "origin",
        *(f"refs/{r}" for r in ("heads/main", "tags/main", "tags/main^{}")),
    ]
    assert sent == over_ssh(
        f"set -e\n[ -d kvpipe/.git ] || git clone --origin origin {url} kvpipe\ncd kvpipe\n"
        "git fetch --prune --tags --force origin\ngit checkout --quiet --force main --\n"
        f"git reset --hard {commit}\ngit status --short"
    )
    assert laptop.calls == []


def test_sync_takes_a_tag_and_a_branch_that_is_on_the_remote_alone(laptop: Laptop) -> None:
    first = git(laptop.clone, "rev-parse", "HEAD")
    git(laptop.clone, "tag", "-a", "v1", "-m", "one")
    git(laptop.clone, "push", "--quiet", "origin", "v1", "main:refs/heads/theirs")
    for ref in ("v1", "theirs"):
        done = sync(laptop, REF=ref)
        assert done.code == 0, done.err
        assert git(laptop.worker(0) / "kvpipe", "rev-parse", "HEAD") == first


def test_sync_refuses_a_ref_that_is_not_pushed(laptop: Laptop) -> None:
    git(laptop.clone, "branch", "mine")
    done = sync(laptop, REF="mine")
    assert done.code != 0
    assert "REF is 'mine', and origin has no branch or tag of this name" in done.err
    git(laptop.clone, "commit", "--quiet", "--allow-empty", "-m", "second")
    done = sync(laptop)
    assert done.code != 0
    assert re.search(r"'main' is at \w{40} here and at \w{40} on origin; push or pull", done.err)
    assert laptop.calls == []


def test_sync_does_not_put_a_token_of_the_remotes_url_on_a_command_line(laptop: Laptop) -> None:
    git(laptop.clone, "remote", "set-url", "origin", "https://me:token@example.com/x.git")
    done = sync(laptop)
    assert done.code != 0
    assert "the URL of origin has a password or token in it; give REPO=https://..." in done.err
    assert "token@" not in done.err
    assert laptop.calls == []


def test_the_operations_in_the_guide_are_ones_that_make_has(laptop: Laptop) -> None:
    """All blocks in one shell, as a reader types them: the values are exported once."""
    page = (ROOT / "docs/guide/tpu.md").read_text()
    script = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    (laptop.clone / ".env").touch()
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=laptop.clone,
        env=laptop.environment | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert laptop.calls == []
    targets = re.findall(r"^make (tpu-\w+)", script, re.MULTILINE)
    assert set(targets) == set(TARGETS)
    assert done.stderr.count("+ gcloud compute tpus tpu-vm ") >= len(targets)


def test_the_guide_explains_every_value() -> None:
    page = (ROOT / "docs/guide/tpu.md").read_text()
    declared = re.search(r"TPU_VALUES := (.*?)\n\n", (ROOT / "ops/tpu.mk").read_text(), re.DOTALL)
    assert declared
    for name in declared[1].replace("\\", " ").split():
        assert f"`{name}" in page, name
