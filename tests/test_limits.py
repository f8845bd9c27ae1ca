import os
import time

import pytest

from kvpipe.errors import InputError, TimedOut
from kvpipe.limits import Limits
from kvpipe.schema import RunnerConfig
from kvpipe.steps import build_steps
from tests.helpers_config import compose_plain, config_of


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


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
def test_the_limit_that_comes_first_is_named_with_its_key(pipe, config, step, said):
    limits = Limits(config)
    limits.begin(step)
    began = time.monotonic()
    with pytest.raises(TimedOut) as caught:
        limits.wait(pipe[0])
    assert str(caught.value) == said
    assert 0.05 < time.monotonic() - began < 5


def test_each_step_has_its_own_clock(pipe):
    limits = Limits(RunnerConfig(phase_timeout_s=0.2))
    limits.begin("a")
    time.sleep(0.3)
    limits.begin("b")
    os.write(pipe[1], b"x")
    limits.wait(pipe[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phase_timeout_s": 0}, "runner.phase_timeout_s is 0, it has to be more than 0 seconds"),
        ({"run_timeout_s": float("nan")}, "runner.run_timeout_s is nan, it has to be more than 0"),
        (
            {"phase_timeouts": {"a": -1}},
            "runner.phase_timeouts.a is -1, it has to be more than 0 seconds",
        ),
        (
            {"isolate": False, "run_timeout_s": 5},
            "runner.run_timeout_s is 5, but runner.isolate is false: only a process of its own can "
            "be ended; leave the limit out",
        ),
        ({"on_error": "contine"}, "runner.on_error is 'contine'; did you mean 'continue'?"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_its_key(options, said):
    with pytest.raises(InputError) as caught:
        RunnerConfig(**options)
    assert str(caught.value).startswith(said)


def test_a_limit_of_a_step_that_there_is_not_is_refused_with_the_nearest():
    plain = compose_plain("runner.phase_timeouts.jax_raedy=5")
    with pytest.raises(InputError) as caught:
        build_steps(config_of(plain))
    assert str(caught.value) == (
        "runner.phase_timeouts.jax_raedy: the pipeline has no step 'jax_raedy'; "
        "did you mean 'jax_ready'?"
    )
