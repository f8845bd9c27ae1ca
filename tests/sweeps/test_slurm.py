"""Messages about SLURM on a machine without it. The real one is in ``tests/slurm``."""

import logging
import re

import pytest
from hydra import compose, initialize_config_dir

from kvpipe.config.hydra_store import store_schema
from kvpipe.sweeps.slurm_queue import QueueWatcher
from kvpipe.system.places import CONF
from tests.command import kvpipe
from tests.test_guide import table

SWEEP = ("-m", "hydra/launcher=slurm", "engine.max_total_tokens=512,1024")


@pytest.mark.parametrize("launcher", ["slurm", "submitit_slurm", "submitit_local"])
def test_without_the_extra_the_message_says_what_to_install(tmp_path, launcher):
    """The plugin is hidden by a package of its name, in the place of the namespace."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/__init__.py").touch()
    done = kvpipe(tmp_path, "-m", f"hydra/launcher={launcher}", site=tmp_path)
    assert (done.exit_code, done.stdout, done.stderr) == (
        2,
        "",
        "kvpipe: hydra/launcher: it needs kvpipe's extra 'slurm'; in a clone: "
        "pip install '.[slurm]'\n",
    )


def test_without_slurm_the_sweep_is_refused_in_one_message(tmp_path):
    done = kvpipe(tmp_path, *SWEEP, PATH=str(tmp_path))
    assert (done.exit_code, done.stdout) == (2, "")
    reported = [line for line in done.stderr.splitlines() if not line.startswith("[INFO]")]
    assert reported == [
        'kvpipe: hydra/launcher: SLURM accepted no job: Could not detect "srun", are you indeed on a '
        "slurm cluster?"
    ]


@pytest.fixture
def watcher():
    watcher = QueueWatcher()
    for job_id in ("7", "7_0", "7_1"):
        watcher.register_job(job_id)
    return watcher


def test_a_job_counts_as_ended_once_none_of_its_sweep_is_in_the_queue(watcher, caplog):
    caplog.set_level(logging.INFO)
    others = "8_0 RUNNING None\n71 PENDING Priority\n"
    states = [
        watcher.read_info(queue)["7_0"]["State"]
        for queue in (
            f"{others}7_0 RUNNING None\n7_1 PENDING Resources\n",
            "7_1 RUNNING None\n",
            others,
        )
    ]
    assert states == ["RUNNING", "RUNNING", "ENDED"]
    assert [record.message for record in caplog.records] == [
        "SLURM job 7: 1 PENDING Resources, 1 RUNNING",
        "SLURM job 7: 1 RUNNING",
        "SLURM job 7: none left",
    ]


def test_a_queue_that_does_not_answer_ends_no_job(watcher, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not watcher.is_done("7_0", mode="force")


def test_the_guide_has_the_defaults_of_the_launcher():
    store_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True)
    rows = table("cluster.md", "key, below `hydra.launcher`")
    reported = {key: row[1] for cell, row in rows.items() for key in re.findall(r"\w+", cell)}
    for key, text in reported.items():
        value = composed.hydra.launcher[key]
        if text == "the cluster's":
            assert value is None
        elif key == "additional_parameters":
            assert (text, value) == ("`{no-requeue: true}`", {"no-requeue": True})
        else:
            assert text.strip("`") == ("null" if value is None else str(value)), key
    assert len(reported) == 9
