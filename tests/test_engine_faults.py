"""Faults beside a real engine: in its process, in its threads, in its memory, at its start.

What the parent makes of a worker that fails, whatever it runs, is in tests/test_faults.py.
"""

import signal

import pytest

from tests.conftest import ONE_LAYER
from tests.fault_runs import UNTRACKED, Cell, Matrix, names_of

pytestmark = pytest.mark.slow


def cell(*ending, pipeline="on_the_engine", overrides=(UNTRACKED,), **more):
    """Most are untracked: W&B is the parent's, and it gets every kind of end in test_faults.py."""
    return Cell(*ending, pipeline=pipeline, overrides=(ONE_LAYER, *overrides), **more)


CELLS = {
    "SIGKILL to the worker": cell(
        *(3, "SIGKILL in step 'fault', and Linux counted no", "wait"),
        act=lambda run: run.signal_worker(signal.SIGKILL),
    ),
    "segmentation fault": cell(3, "by SIGSEGV", "segfault"),
    "no host memory": cell(4, "MemoryError", "host_memory", cleaned=True),
    "no device memory": cell(4, "RESOURCE_EXHAUSTED", "device_memory", overrides=(), cleaned=True),
    "a hung phase": cell(
        *(5, "step 'fault' took longer than runner.phase_timeouts.fault = 3 s", "wait"),
        overrides=("runner.phase_timeouts.fault=3", UNTRACKED),
    ),
    "an engine that does not start": cell(
        *(3, "the engine failed: ", "spoil_the_model"),
        pipeline="before_the_engine",
        failing="engine_ready_dummy",
        cleaned=True,
    ),
    "a thread of the engine fails": cell(
        *(3, "the engine failed: ", "generate_while_dropped"),
        finds="a run that outlives a thread of its engine, or does not say what failed in it",
    ),
    "SIGQUIT to the worker": cell(
        *(3, "the engine failed: ", "wait_for_signal"),
        act=lambda run: run.signal_worker(signal.SIGQUIT),
        finds="SIGQUIT, by which the engine's threads say that they failed, ends the worker",
    ),
    "SIGTERM to the parent": cell(
        *(143, "SIGTERM ended the run", "wait"),
        act=lambda run: run.interrupt(signal.SIGTERM),
        finds="a process or a thread of the engine that outlives a run which a signal ended",
    ),
    # The last: its engine starts and cleans after all the others.
    "exception in a phase that changes": cell(
        *(3, "step 'fault': ValueError: a fault of the tests", "exception"),
        overrides=(),
        cleaned=True,
    ),
}
TRACKED = {name: cell for name, cell in CELLS.items() if cell.tracked}


@pytest.fixture(scope="module")
def matrix(request, tmp_path_factory):
    with Matrix(request, tmp_path_factory) as matrix:
        yield matrix


@pytest.mark.parametrize("name", names_of(CELLS))
def test_a_fault_ends_in_its_exit_code_and_a_truthful_record(name, matrix):
    matrix.check_end(name)


@pytest.mark.parametrize("name", names_of(CELLS))
def test_after_a_fault_every_earlier_record_and_that_of_the_failing_phase_are_there(name, matrix):
    matrix.check_records(name)


@pytest.mark.parametrize("name", names_of(CELLS))
def test_after_a_fault_nothing_of_the_run_is_left_on_the_machine(name, matrix):
    matrix.check_machine(name)


@pytest.mark.parametrize("name", names_of(TRACKED))
def test_after_a_fault_the_offline_file_of_wandb_can_be_read(name, matrix):
    matrix.check_wandb(name)


def test_a_hung_phase_leaves_the_stacks_of_all_threads(matrix):
    run = matrix.run("a hung phase")
    stacks = (run.run_dir / "stacks.txt").read_text()
    assert "in hang" in stacks
    assert stacks.count("Thread 0x") >= 2
    assert f"the stacks of its threads are in {run.run_dir}/stacks.txt" in run.end["error"]


def test_out_of_memory_names_what_was_held_and_what_had_been_planned(matrix):
    run = matrix.run("no device memory")
    assert run.end["ledger"] == run.record("fault")["ledger"]
    assert run.end["planned"]["name"] == "fault"
    held = ", ".join(f"{pool} {size:,}" for pool, size in run.end["ledger"].items())
    assert f"last measured, bytes over all devices: {held}\n" in run.end["error"]
    planned = run.end["planned"]["total_bytes"]
    assert f"planned after 'fault': {planned:,} bytes over all devices" in run.end["error"]
