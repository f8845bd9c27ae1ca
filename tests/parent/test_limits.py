import os
import signal
import time
from types import SimpleNamespace

import pytest

from kvpipe.config.schema import RunnerConfig
from kvpipe.errors import TimedOut
from kvpipe.parent import limits
from kvpipe.parent.limits import Limits
from kvpipe.pipeline.steps import build_steps
from tests.helpers_config import compose_plain, config_of
from tests.refusal import refusal


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


class Clock:
    """Time that passes when the test says so, and a descriptor that never has anything to read.

    Attributes:
        now: what it shows, in seconds.
        waited: how long each wait was at most, in seconds.
    """

    def __init__(self):
        self.now = 1000.0
        self.waited = []

    def is_readable(self, descriptor, seconds):
        self.waited.append(seconds)
        self.now += seconds or 0.0
        return False


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(limits, "is_readable", clock.is_readable)
    return clock


def test_without_a_limit_what_can_be_read_is_waited_for(pipe):
    limits = Limits(RunnerConfig())
    limits.begin("a")
    os.write(pipe[1], b"x")
    limits.wait(pipe[0])
    assert os.read(pipe[0], 1) == b"x"


@pytest.mark.parametrize(
    ("config", "step", "said"),
    [
        (
            RunnerConfig(phase_timeout_s=0.1),
            "a",
            "step 'a' took longer than runner.phase_timeout_s = 0.1 s",
        ),
        (
            RunnerConfig(phase_timeout_s=9, phase_timeouts={"a": 0.1}),
            "a#2",
            "step 'a#2' took longer than runner.phase_timeouts.a = 0.1 s",
        ),
        (
            RunnerConfig(phase_timeout_s=9, run_timeout_s=0.1),
            "a",
            "the run took longer than runner.run_timeout_s = 0.1 s; it was in step 'a'",
        ),
    ],
)
def test_the_limit_that_comes_first_is_named_with_its_key(clock, config, step, said):
    limits = Limits(config)
    limits.begin(step)
    with pytest.raises(TimedOut) as caught:
        limits.wait(0)
    assert str(caught.value) == said
    assert clock.waited == [pytest.approx(0.1)]


def test_a_real_pipe_that_says_nothing_is_waited_for_until_the_limit(pipe):
    limits = Limits(RunnerConfig(phase_timeout_s=0.1))
    limits.begin("a")
    with pytest.raises(TimedOut):
        limits.wait(pipe[0])


@pytest.mark.parametrize("options", [{"phase_timeout_s": 0.05}, {"run_timeout_s": 0.05}])
def test_a_step_in_this_process_that_hangs_is_interrupted_at_the_limit(options):
    before = signal.getsignal(signal.SIGALRM)
    limits = Limits(RunnerConfig(**options))
    limits.begin("wandb_init")
    with pytest.raises(TimedOut, match=r"'?wandb_init'?") as caught, limits.in_parent():
        time.sleep(5)
    assert f"runner.{next(iter(options))} = 0.05 s" in str(caught.value)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_step_in_this_process_without_a_limit_sets_no_timer():
    before = signal.getsignal(signal.SIGALRM)
    with Limits(RunnerConfig()).in_parent():
        assert signal.getsignal(signal.SIGALRM) == before


def test_each_step_has_its_own_clock_and_all_have_that_of_the_run(clock):
    limits = Limits(RunnerConfig(phase_timeout_s=4, run_timeout_s=9))
    waited = []
    for step, began in (("a", 0), ("b", 3), ("c", 6)):
        clock.now = 1000.0 + began
        limits.begin(step)
        with pytest.raises(TimedOut):
            limits.wait(0)
        waited.append(clock.waited[-1])
    assert waited == pytest.approx([4, 4, 3])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phase_timeout_s": 0}, "runner.phase_timeout_s is 0, it must be more than 0 seconds"),
        ({"run_timeout_s": float("nan")}, "runner.run_timeout_s is nan, it must be more than 0"),
        (
            {"phase_timeouts": {"a": -1}},
            "runner.phase_timeouts.a is -1, it must be more than 0 seconds",
        ),
        (
            {"isolate": False, "run_timeout_s": 5},
            "runner.run_timeout_s is 5, but runner.isolate is false: only a child process can be "
            "ended; leave the limit out",
        ),
        ({"on_error": "contine"}, "runner.on_error is 'contine'; did you mean 'continue'?"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_its_key(options, said):
    assert refusal(RunnerConfig, **options).startswith(said)


def test_a_limit_of_a_step_that_there_is_not_is_refused_with_the_nearest():
    plain = compose_plain("runner.phase_timeouts.jax_raedy=5")
    assert refusal(build_steps, config_of(plain)) == (
        "runner.phase_timeouts.jax_raedy: the pipeline has no step 'jax_raedy'; "
        "did you mean 'jax_ready'?"
    )
