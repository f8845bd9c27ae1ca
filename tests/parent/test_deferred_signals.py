import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvpipe.config.schema import Kvpipe, RunnerConfig
from kvpipe.errors import Interrupted
from kvpipe.parent import deferred_signals as module
from kvpipe.parent.deferred_signals import DeferredSignals
from kvpipe.parent.limits import Limits
from kvpipe.parent.preemption import Preemption
from kvpipe.parent.supervisor import Run
from kvpipe.sinks import Sink

PATIENCE_S = 60


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2],
    ids=str,
)
def test_a_signal_is_raised_where_it_is_allowed(signum):
    before = signal.getsignal(signum)
    with (
        DeferredSignals() as deferred,
        pytest.raises(Interrupted) as caught,
        deferred.allowed(),
    ):
        send(signum)
        time.sleep(5)
    assert caught.value.exit_code == 128 + signum
    assert str(caught.value) == f"{signal.Signals(signum).name} ended the run"
    assert signal.getsignal(signum) == before


def test_a_signal_waits_until_it_is_allowed():
    done = []
    with DeferredSignals() as deferred:
        send(signal.SIGTERM)
        done.append("the record is written")
        with pytest.raises(Interrupted), deferred.allowed():
            done.append("never")
    assert done == ["the record is written"]


@pytest.fixture
def seconds(monkeypatch):
    """The seconds that pass from each signal to the next, for a test to set."""
    passed = SimpleNamespace(now=0.0, each=0.0)

    def monotonic():
        passed.now += passed.each
        return passed.now

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    return passed


@pytest.fixture
def child():
    """A child that ends when its input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        yield process
        process.kill()


def test_a_second_signal_kills_every_child_and_raises_nothing(child, seconds):
    seconds.each = 0.3
    with DeferredSignals() as deferred:
        with pytest.raises(Interrupted), deferred.allowed():
            send(signal.SIGINT)
            time.sleep(5)
        send(signal.SIGINT)
        assert child.wait(PATIENCE_S) == -signal.SIGKILL


def test_the_same_press_that_comes_twice_is_one(child, seconds):
    """Some launchers pass the terminal's Ctrl-C on to a child that has got it already."""
    seconds.each = 0.2
    with DeferredSignals():
        send(signal.SIGINT)
        send(signal.SIGINT)
        child.communicate(b"the end\n", timeout=PATIENCE_S)
        assert child.returncode == 0


def test_under_nohup_the_end_of_the_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with DeferredSignals() as deferred, deferred.allowed():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_the_worker_sent_before_a_signal_is_read_before_that_ends_the_run():
    """It may be in the next step while the parent is at the record of the last one."""
    reading, writing = os.pipe()
    os.write(writing, b"x")
    with DeferredSignals() as signals:
        run: Any = SimpleNamespace(
            sinks=Sink(),
            _signals=signals,
            _limits=Limits(RunnerConfig()),
            _preemption=Preemption(Kvpipe()),
        )
        send(signal.SIGINT)
        Run._wait(run, run, reading)
        assert os.read(reading, 2) == b"x"
        with pytest.raises(Interrupted):
            Run._wait(run, run, reading)
    os.close(reading)
    os.close(writing)
