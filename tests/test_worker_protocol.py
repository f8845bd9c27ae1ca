"""Protocol of the worker's process, with a test in the parent's place and no engine."""

import selectors
import time
from dataclasses import asdict

import pytest

from kvpipe.errors import Ending
from kvpipe.parent.child_process import start_child
from kvpipe.pipeline.cycles import SAVED
from kvpipe.worker.orders import Orders
from tests import faults
from tests.command import environment
from tests.helpers_config import compose_plain

PHASES = {
    "fault": {"use": "fault_changes", "how": "leave_a_mark"},
    "after": {"use": "fault_changes"},
    "last": {"use": "fault_changes"},
}


@pytest.fixture
def overrides():
    """What the worker's config has beside its steps."""
    return {}


@pytest.fixture
def worker(tmp_path, monkeypatch, overrides):
    """A worker that has got its job: to leave a mark, and then to do nothing."""
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site"
    faults.write_site(site)
    config = compose_plain() | {"pipeline": list(PHASES), "phases": PHASES} | overrides
    module, log = "tests.without_engine.worker", tmp_path / "log"
    with start_child(module, log, environment(tmp_path, site), 60.0) as child:
        scratch = str(child.scratch)
        child.send({"config": config, "run_began": time.monotonic(), "scratch": scratch})
        yield child


def is_silent(child):
    """Whether it says nothing for a time in which it could."""
    with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
        selector.register(child.reports, selectors.EVENT_READ)
        return selector.select(1.0) == []


def test_the_worker_is_at_most_two_steps_ahead_of_the_parent(worker, tmp_path):
    """While steps run the parent writes the records before; a third would be lost with the parent."""
    messages, mark = worker.messages(), tmp_path / "mark"
    assert is_silent(worker)
    worker.send({"begin": "run_planned"})
    assert next(messages) == {"hosts": []}
    assert [phase["name"] for phase in next(messages)["phases"]] == ["fault", "after", "last"]
    assert next(messages) == {"started": "fault", "idx": 0}
    assert next(messages)["phase"] == "fault"
    assert mark.exists()
    assert next(messages) == {"started": "after", "idx": 1}
    assert next(messages)["phase"] == "after"
    assert is_silent(worker)
    worker.send({"begin": "fault"})
    assert next(messages) == {"started": "last", "idx": 2}
    assert next(messages)["phase"] == "last"
    assert next(messages) == asdict(Ending())
    assert list(messages) == []
    assert worker.how_it_ended() == "exit code 0"


A_SAVE = {
    "pipeline": ["fault", "after"],
    "phases": {"fault": PHASES["fault"], "after": PHASES["after"], SAVED: {"use": "fault_changes"}},
    "repeat": {"first": "after", "last": "after", "times": 2},
    "trainer": compose_plain()["trainer"] | {"checkpoint_every": 1, "checkpoint_dir": "saved"},
}


@pytest.mark.parametrize("overrides", [A_SAVE])
def test_a_save_waits_until_all_records_are_written_and_the_step_after_it_for_that_of_the_save(
    worker,
):
    """A resumed run repeats neither, so their records would be lost with the parent."""
    messages = worker.messages()
    worker.send({"begin": "run_planned"})
    begun = [next(messages) for _ in range(6)]
    assert [message.get("phase") for message in begun[3::2]] == ["fault", "after"]
    worker.send({"begin": "fault"})
    assert next(messages) == {"started": SAVED, "idx": 2}
    worker.send({"begin": "after"})
    assert is_silent(worker)
    worker.send({"begin": SAVED})
    assert next(messages)["phase"] == SAVED
    assert next(messages) == {"started": "after#2", "idx": 3}
    assert is_silent(worker)
    worker.send({"begin": "after#2"})
    assert next(messages)["phase"] == "after#2"


def test_a_worker_that_is_ordered_to_stop_says_which_step_it_leaves_out(worker):
    worker.send({"begin": "run_planned"})
    messages = worker.messages()
    begun = [next(iter(next(messages))) for _ in range(6)]
    assert begun == ["hosts", "phase", "started", "phase", "started", "phase"]
    worker.send({"stop": "fault"})
    worker.send({"begin": "fault"})
    assert list(messages) == [{"stopped": "last"}, asdict(Ending())]


def test_after_an_order_to_stop_the_save_need_not_wait_for_the_step_that_was_left_out():
    orders = Orders()
    orders.began()
    orders.began()
    orders.take('{"stop": "a step"}')
    orders.take('{"begin": "a step"}')
    orders.catch_up()
    assert orders.stopped
    orders.catch_up()


def test_a_worker_whose_parent_has_gone_ends_at_once_with_its_temporary_files(worker):
    (worker.scratch / "a temporary file").touch()
    worker.send({"begin": "run_planned"})
    messages = worker.messages()
    assert [next(iter(next(messages))) for _ in range(2)] == ["hosts", "phase"]
    assert [next(iter(next(messages))) for _ in range(2)] == ["started", "phase"]
    assert [next(iter(next(messages))) for _ in range(2)] == ["started", "phase"]
    worker.end_jobs()
    assert list(messages) == []
    assert worker.how_it_ended() == "SIGKILL"
    assert not worker.scratch.exists()
