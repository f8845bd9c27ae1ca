"""The doctor: what it finds on machines that are made up piece by piece, and on this one."""

import os
from collections import namedtuple
from types import SimpleNamespace

import pytest

from kvpipe.parent import doctor
from kvpipe.parent.doctor import Level
from kvpipe.pipeline.steps import build_steps
from kvpipe.plan.fold import check_order
from kvpipe.system.libtpu_lock import Holder, holder
from tests.command import FAKE_KEY, kvpipe
from tests.helpers_config import compose_plain, config_of

BIGKV = "+experiment=qwen25_3b_bigkv"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory, without a key, a token or a cache."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def reached(timeout_s):
    return "https://wandb.example"


def unreachable(timeout_s):
    raise ConnectionRefusedError(111, "Connection refused")


def wandb(*overrides, find_server=reached):
    config = config_of(compose_plain(*overrides))
    (finding,) = doctor._wandb(config, check_order(build_steps(config)), find_server)
    return finding


def hugging_face(*overrides):
    (finding,) = doctor._hugging_face(config_of(compose_plain(*overrides)))
    return finding


def test_a_line_has_how_good_it_is_what_it_is_and_what_to_do():
    finding = doctor.Finding(Level.BAD, "disk", "0.000 GiB free", "make room")
    assert str(finding) == "bad   disk          0.000 GiB free; make room"
    assert str(doctor.Finding(Level.OK, "disk", "much")) == "ok    disk          much"


def test_online_wandb_needs_a_key_but_for_a_fallback(here):
    missing = wandb(BIGKV)
    assert (missing.level, missing.found) == (Level.BAD, "online, no API key")
    assert "WANDB_API_KEY" in missing.todo
    assert wandb(BIGKV, "tracking.fallback_offline=true").level is Level.WARN
    offline = wandb(BIGKV, "tracking=offline")
    assert (offline.level, offline.found) == (Level.OK, "offline, no API key")


def test_the_key_is_named_by_its_place_and_never_shown(here, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    finding = wandb(BIGKV)
    assert finding.level is Level.OK
    assert finding.found == (
        "online, an API key in the environment, https://wandb.example is reached"
    )
    monkeypatch.delenv("WANDB_API_KEY")
    env_file = here / ".env"
    env_file.write_text(f"WANDB_API_KEY={FAKE_KEY}")
    env_file.chmod(0o600)
    assert "an API key in .env" in wandb(BIGKV).found
    env_file.chmod(0o644)
    readable = wandb(BIGKV)
    assert readable.level is Level.BAD
    assert "chmod 600" in readable.found
    assert FAKE_KEY not in str(readable)
    assert wandb("tracking=offline").level is Level.WARN


def test_a_server_that_is_not_there_is_reported(here, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    finding = wandb(BIGKV, find_server=unreachable)
    assert finding.level is Level.BAD
    assert "no server: [Errno 111] Connection refused" in finding.found


def test_a_pipeline_without_wandb_needs_none_of_it(here):
    config = config_of(compose_plain("tracking=online") | {"pipeline": ["jax_ready"], "phases": {}})
    (finding,) = doctor._wandb(config, check_order(build_steps(config)), unreachable)
    assert finding.level is Level.OK
    assert finding.found == "online, no API key; the pipeline does not use it"


def test_a_model_of_the_hub_must_be_in_the_cache_or_downloadable(here, monkeypatch):
    from huggingface_hub import constants

    cache = f"engine.download_dir={here}"
    missing = hugging_face(BIGKV, cache)
    assert missing.level is Level.WARN
    assert "Qwen/Qwen2.5-3B-Instruct is not in the cache" in missing.found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hugging_face(BIGKV, cache).level is Level.BAD
    repository = here / "models--Qwen--Qwen2.5-3B-Instruct"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    found = hugging_face(BIGKV, cache)
    assert (found.level, found.found.endswith("is in the cache")) == (Level.OK, True)


def test_the_token_is_mentioned_and_not_shown(here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "t0ken" * 6)
    finding = hugging_face()
    assert finding.level is Level.OK
    assert ", a token; the model does not come from it" in finding.found
    assert "t0ken" not in str(finding)


def test_who_has_the_tpu_is_reported(monkeypatch):
    held = Holder(4711, "anna", "python -m kvpipe")
    monkeypatch.setattr(doctor, "holder", lambda: held)
    finding = doctor._libtpu_lock("tpu")
    assert finding.level is Level.BAD
    assert finding.found == "process 4711 of anna has the TPU: python -m kvpipe"
    assert doctor._libtpu_lock("cpu").level is Level.OK


def test_a_lock_file_of_another_user_is_in_the_way_of_a_tpu(monkeypatch, tmp_path):
    path = tmp_path / "libtpu_lockfile"
    path.touch()
    monkeypatch.setattr(doctor, "holder", lambda: None)
    monkeypatch.setattr(doctor, "LOCK_FILE", path)
    assert doctor._libtpu_lock("tpu").level is Level.OK
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = doctor._libtpu_lock("tpu")
    assert (finding.level, finding.todo) == (Level.BAD, f"run: sudo rm {path}")


@pytest.mark.parametrize(
    ("free", "level"), [(1 << 20, Level.BAD), (1 << 28, Level.WARN), (1 << 40, Level.OK)]
)
def test_little_disk_is_a_warning_and_none_is_bad(monkeypatch, free, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(1 << 41, 0, free))
    assert doctor._disk().level is level


def test_little_memory_is_a_warning(monkeypatch):
    memory = SimpleNamespace(available=1 << 20, total=1 << 34)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    assert doctor._ram().level is Level.WARN


def test_a_package_that_is_missing_is_bad(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("jax", "no-such-package"))
    reported, missing = doctor._versions()
    assert (reported.level, missing.level) == (Level.OK, Level.BAD)
    assert missing.found == "not installed: no-such-package"


ANSWER = {
    "devices": {"device_count": 4, "device_kind": "TPU v4", "platform": "tpu"},
    "hbm_bytes": 32 << 30,
    "patches": ["a", "b"],
    "why_not_fit": None,
    "peak_bytes": 16 << 30,
    "warning": None,
}


def reported(**more):
    return list(doctor._findings_of(ANSWER | more, config_of(compose_plain())))


def test_the_devices_the_patches_and_the_plan_are_reported():
    devices, patches, plan = reported()
    assert devices.found == "4 × TPU v4 (tpu), 32.00 GiB each"
    assert patches.found == "a, b"
    assert (plan.level, plan.found) == (
        Level.OK,
        "tiny fits, peak 16.00 GiB of 32.00 GiB a device",
    )
    assert str(reported(warning="only 5 bytes stay free")[2]) == (
        "warn  plan          tiny fits, peak 16.00 GiB of 32.00 GiB a device; only 5 bytes stay free"
    )
    assert reported(why_not_fit="it does not fit")[2].level is Level.BAD
    assert reported(peak_bytes=None) == [devices, patches]
    (error,) = reported(error="no devices")
    assert (error.level, error.found) == (Level.BAD, "no devices")


def test_a_shape_that_only_the_hub_knows_is_a_warning_in_the_words_of_the_plan():
    plain = compose_plain(BIGKV, "model.id=Qwen/Qwen2.5-7B-Instruct")
    finding = next(doctor._devices(config_of(plain), plain))
    assert (finding.level, finding.about) == (Level.WARN, "plan")
    assert finding.found.startswith("model.config: a plan needs the shape of 'Qwen/Qwen2.5-7B")


def test_the_tiny_experiment_could_run_here(tmp_path):
    done = kvpipe(tmp_path, "doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    *findings, verdict = done.stdout.splitlines()
    assert verdict == "tiny could run here"
    assert {line.split()[0] for line in findings} <= {"ok", "warn"}
    assert any("devices       2 × cpu (cpu)" in line for line in findings)
    assert any("failure_does_not_kill" in line for line in findings)
    assert FAKE_KEY not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_for_a_tpu_could_not_run_on_a_machine_without_one(tmp_path):
    done = kvpipe(tmp_path, "doctor", BIGKV, "tracking=offline")
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1] == "qwen25_3b_bigkv could not run here"
    (bad,) = (line for line in done.stdout.splitlines() if line.startswith("bad"))
    # The tests that compile for a TPU leave libtpu's lock to this very process.
    assert ("has the TPU" if holder() else "Unable to initialize backend 'tpu'") in bad
