import os
import signal
import subprocess
import sys
import time

import pytest

from kvpipe.interrupts import Interrupted, Interrupts


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2],
    ids=str,
)
def test_a_signal_is_raised_where_it_is_allowed(signum):
    before = signal.getsignal(signum)
    with Interrupts() as interrupts, pytest.raises(Interrupted) as caught, interrupts.allowed():
        send(signum)
        time.sleep(5)
    assert caught.value.signum == signum
    assert str(caught.value) == f"{signal.Signals(signum).name} ended the run"
    assert signal.getsignal(signum) == before


def test_a_signal_waits_until_it_is_allowed():
    done = []
    with Interrupts() as interrupts:
        send(signal.SIGTERM)
        done.append("the record is written")
        with pytest.raises(Interrupted), interrupts.allowed():
            done.append("never")
    assert done == ["the record is written"]


def test_a_second_signal_kills_every_child_and_raises_nothing():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted), interrupts.allowed():
            send(signal.SIGINT)
            time.sleep(5)
        time.sleep(0.3)
        send(signal.SIGINT)
        assert child.wait(10) == -signal.SIGKILL


def test_the_same_press_that_comes_twice_is_one():
    """Some launchers pass the terminal's Ctrl-C on to a child that has got it already."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    with Interrupts():
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert child.wait(10) == 0


def test_under_nohup_the_end_of_the_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts, interrupts.allowed():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
