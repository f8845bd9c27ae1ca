"""Starting and failing: wrong meshes, a cut capacity, a dying thread, a busy engine."""

import asyncio
import atexit
import itertools
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpipe.errors import EngineError, InputError
from tests.conftest import IDLE_TIMEOUT_S, StartEngine, busy, engine_config, greedy


@pytest.fixture
def alone() -> Iterator[None]:
    """Let engines of other tests not notice that the engine of this one fails.

    A run has one engine a process; only tests have several. From bd09a87 on an engine takes the event
    loop of the thread that starts it, and a request that is never answered keeps that loop running.
    """
    logger, on_sigquit = logging.getLogger("sgl_jax"), signal.getsignal(signal.SIGQUIT)
    others, logger.handlers = logger.handlers, []
    asyncio.set_event_loop(asyncio.new_event_loop())
    yield
    asyncio.set_event_loop(asyncio.new_event_loop())
    logger.handlers = others
    signal.signal(signal.SIGQUIT, on_sigquit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_size": 2}, "is 2 × 1, but jax has 4 cpu devices"),
        ({"tp_size": 4, "dp_size": 2}, "is 4 × 2, but jax has 4 cpu devices"),
        ({"device": "tpu"}, "engine.device is 'tpu', but jax runs on 'cpu'"),
    ],
)
def test_a_mesh_that_is_not_the_machines_is_refused(
    four_devices: None, options: dict[str, Any], message: str
) -> None:
    from kvpipe.engine.devices import check_devices

    with pytest.raises(InputError, match=message):
        check_devices(engine_config(**options))


def test_the_sampler_is_patched_in_the_version_that_needs_it_and_in_no_later_one(
    real_engine: Any,
) -> None:
    """Later commits that call themselves 0.0.2 too took its patches for theirs."""
    from sgl_jax.srt.layers import sampler
    from sgl_jax.srt.utils import jax_utils

    from kvpipe.engine import compat

    patched = sampler.is_tpu_runtime is not jax_utils.is_tpu_runtime
    assert patched == ("sampler_off_tpu" in compat.in_force())
    assert patched != compat.shards_explicitly()


@pytest.mark.parametrize(
    ("explicit", "max_prefill_tokens", "page_size", "arguments"),
    [
        (True, 256, 1, {"chunked_prefill_size": 256}),
        (True, 250, 16, {"chunked_prefill_size": 240}),
        (True, 8, 16, {"chunked_prefill_size": 16}),
        (True, 4096, 1, {}),
        (False, 256, 1, {}),
    ],
)
def test_later_versions_prefill_no_more_at_once_than_their_programs_take(
    four_devices: None,
    monkeypatch: pytest.MonkeyPatch,
    explicit: bool,
    max_prefill_tokens: int,
    page_size: int,
    arguments: dict[str, int],
) -> None:
    from kvpipe.engine import compat

    monkeypatch.setattr(compat, "shards_explicitly", lambda: explicit)
    assert compat.prefill_within_its_program(max_prefill_tokens, page_size) == arguments


def test_no_batch_has_its_page_table_in_the_array_of_another(
    four_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from sgl_jax.srt.managers.schedule_batch import ScheduleBatch

    from kvpipe.engine import compat

    shared = np.arange(8)

    def part_of_shared(batch: Any, size: int) -> Any:
        return shared[:size]

    monkeypatch.setattr(ScheduleBatch, "_merge_cache_loc", part_of_shared, raising=False)
    for _ in range(2):  # an engine of a process after its first
        compat.page_table_of_each_batch_is_its_own()
    table = ScheduleBatch._merge_cache_loc(None, 4)  # pyright: ignore[reportAttributeAccessIssue]
    assert table.tolist() == [0, 1, 2, 3]
    assert not np.shares_memory(table, shared)


def test_a_capacity_that_the_engine_cut_down_is_an_error(
    start_engine: StartEngine, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The engine looks twice, and another process may have taken memory in between.
    free_memory(monkeypatch, itertools.repeat(2 << 30))
    too_many = start_engine(tiny_dir, max_total_tokens=900_000, mem_fraction_static=0.03)
    with pytest.raises(EngineError, match="the engine cut 900000 tokens down to"), too_many:
        pass


def free_memory(monkeypatch: pytest.MonkeyPatch, looks: Iterator[int]) -> None:
    """Let the engine find so many bytes free each time that it looks."""
    from sgl_jax.srt.model_executor.model_runner import ModelRunner

    monkeypatch.setattr(ModelRunner, "get_available_device_memory", lambda self: next(looks))


@pytest.mark.slow
def test_a_dying_engine_thread_raises_its_reason_instead_of_hanging(
    four_devices: None, tiny_dir: Path, alone: None
) -> None:
    """The engine sends SIGQUIT to its parent process and never answers the request."""
    from kvpipe.engine import sglang

    engine = sglang.start(engine_config(), tiny_dir, IDLE_TIMEOUT_S)

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("the chip caught fire")

    engine.runner.jitted_run_model = broken
    with pytest.raises(EngineError, match="ZeroDivisionError: the chip caught fire"):
        engine.generate("Hello", greedy(4))
    with pytest.raises(EngineError, match="the chip caught fire"):
        engine.flush()


@pytest.mark.slow
def test_an_engine_that_fails_to_start_raises_its_reason_and_leaves_nothing_for_the_end(
    four_devices: None, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpipe.engine import sglang

    (tmp_path / "config.json").write_text("{}")
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda function, *_: at_exit.append(function))
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    with pytest.raises(EngineError, match="the engine failed"):
        sglang.start(engine_config(), tmp_path, IDLE_TIMEOUT_S)
    assert [function for function in at_exit if "sgl_jax" in function.__module__] == []


@pytest.mark.slow
def test_an_engine_that_failed_to_start_can_be_collected(
    four_devices: None, tiny_dir: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyzmq would end its contexts within the collection, and wait there for their sockets."""
    from kvpipe.engine import memory, sglang

    free_memory(monkeypatch, iter((16 << 30, 1 << 30)))
    with pytest.raises(EngineError, match="Not enough memory") as failed:
        sglang.start(engine_config(), tiny_dir, IDLE_TIMEOUT_S)
    garbage: list[Any] = [failed]  # its traceback's frames have the engine's parts
    garbage.append(garbage)
    del failed, garbage
    collector = threading.Thread(target=memory.collect_garbage, daemon=True)
    collector.start()
    collector.join(IDLE_TIMEOUT_S)
    assert not collector.is_alive(), "the collection waits for ever"


def test_a_busy_engine_is_waited_for_and_then_named(
    real_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with busy(real_engine), monkeypatch.context() as patch:
        patch.setattr(real_engine.on_scheduler, "_idle_timeout_s", 0.2)
        with pytest.raises(EngineError, match=r"still busy after 0.2 s.*running 1"):
            real_engine.flush()
    assert real_engine.flush()["free_tokens"] == 1024
