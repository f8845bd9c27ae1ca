"""The verbs in a process of one's own, on an engine that the script of the guide has made.

All tests share that engine, in the order of this file; the last one lets it fail.
"""

import asyncio
import gc
import inspect
import itertools
import re
import signal
import subprocess
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import kvpipe
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.report.run import read_run
from tests.api.test_interface import GUIDE
from tests.conftest import DEVICES, IDLE_TIMEOUT_S, SMALL_ENGINE

SCRIPT, CYCLE = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
CLUSTER = re.search(r"^```\n(attached = .*?)^```", GUIDE, re.DOTALL | re.MULTILINE)[1]
SIGNATURES = {
    "attach": "(engine: Any, *, idle_timeout_s: float = 60.0, weight_digests: bool = True) -> 'Attached'",
    "engine_patches": "() -> contextlib.AbstractContextManager[None]",
    "open_checkpoint": "(directory: pathlib.Path | str) -> "
    "dict[str, numpy.ndarray[tuple[int, ...], numpy.dtype[typing.Any]]]",
    "record": "(attached: kvpipe.api.attached.Attached, run_dir: pathlib.Path | str, *, "
    "experiment: str = 'attached') -> collections.abc.Iterator[None]",
}
VERBS = {
    "kv_released": "(self) -> collections.abc.Iterator[int]",
    "kv_offloaded": "(self) -> collections.abc.Iterator[int]",
    "weights_released": "(self, *, keep: bool = True) -> collections.abc.Iterator[int]",
    "sync": "(self, named_arrays: collections.abc.Mapping[str, "
    "numpy.ndarray[typing.Any, typing.Any] | jax.Array]) -> str | None",
    "memory": "(self) -> kvpipe.pipeline.ledger.Ledger",
    "detach": "(self) -> None",
}
KV_BYTES = 3 * (1024 + 1) * 2 * DEVICES * 128 * 2
pytestmark = pytest.mark.slow


@contextmanager
def signals_as_before() -> Iterator[None]:
    """Undo what an engine and its event loop in the main thread do to this process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGCHLD, signal.SIGQUIT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.fixture(scope="module")
def script(four_devices, tiny_dir, model_cache):
    """The names of the guide's script after it has run; it fails if an assertion of it does."""
    from sgl_jax.srt.server_args import ServerArgs

    precompiles = {"disable_jax_precompile", "disable_precompile"} & {
        *ServerArgs.__dataclass_fields__
    }
    options = SMALL_ENGINE | {
        "dtype": "bfloat16",
        "mem_fraction_static": 0.8,
        **dict.fromkeys(precompiles, True),
    }
    names = {
        "MODEL": str(tiny_dir),
        "OTHER": str(ensure(TinyModel(seed=1), model_cache)),
        "OPTIONS": options,
        "GREEDY": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
    }
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with signals_as_before():
        exec(compile(SCRIPT, "the script of attach.md", "exec"), names)
        after = SimpleNamespace(**names)
        yield after
        after.attached._ctx.engine.shut_down()
    loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def attached(script):
    return script.attached


def generate(script, prompt="Hello", tokens=4):
    """Generate on the script's event loop, which is the main thread's."""
    params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    return script.engine.generate(prompt, params)


def test_the_script_of_the_guide_holds_in_at_most_fifteen_lines(script):
    lines = [line for line in SCRIPT.splitlines() if line.strip()]
    assert len(lines) <= 15
    assert script.freed == script.kv_bytes == KV_BYTES
    assert len(script.first) == 4


def test_no_signature_has_changed_by_accident(script):
    assert [name for name in vars(kvpipe.Attached) if not name.startswith("_")] == [*VERBS]
    for owner, signatures in ((kvpipe, SIGNATURES), (kvpipe.Attached, VERBS)):
        found = {name: str(inspect.signature(getattr(owner, name))) for name in signatures}
        assert found == signatures


def test_a_child_of_the_callers_has_its_own_exit_status(script):
    """The engine's handler of SIGCHLD takes it, so that the one who waits is told of a success."""
    with ThreadPoolExecutor(
        1
    ) as threads:  # whoever waits in another thread, it interrupts this one
        for run in (
            subprocess.run,
            lambda command: threads.submit(subprocess.run, command).result(),
        ):
            assert [run(["false"]).returncode for _ in range(5)] == [1] * 5


def test_what_cannot_be_attached_is_refused_with_the_remedy(script):
    engine = script.engine
    several = SimpleNamespace(server_args=SimpleNamespace(nnodes=2), scheduler_info={})
    processes = SimpleNamespace(server_args=SimpleNamespace(nnodes=1), scheduler_info={})
    second = SimpleNamespace(
        server_args=SimpleNamespace(nnodes=1),
        scheduler_info={"scheduler": SimpleNamespace()},
        tokenizer_manager=SimpleNamespace(generate_request=engine.generate),
    )
    for wrong, why in [
        (engine, "this engine is attached already; detach it first"),
        (second, "another engine is attached already; detach it first"),
        (several, "runs on 2 hosts; it must be on one"),
        (processes, "construct it with enable_single_process=True"),
        ("engine", "'engine' is not an Engine of sglang-jax"),
    ]:
        with pytest.raises(kvpipe.InputError, match=f"^attach: .*{why}"):
            kvpipe.attach(wrong)


def test_within_a_release_the_guards_of_the_phases_hold(script, attached):
    with attached.kv_released():
        with pytest.raises(kvpipe.EngineError, match="cannot generate: its KV cache is dropped"):
            generate(script)
        with (
            pytest.raises(kvpipe.EngineError, match="the KV cache is not there"),
            attached.kv_released(),
        ):
            pass
        with pytest.raises(kvpipe.EngineError, match="its KV cache is dropped; rebuild it first"):
            attached.detach()
    assert generate(script)["output_ids"] == script.first


def test_offloaded_prefixes_come_back_and_after_a_sync_the_cache_is_built_anew(script, attached):
    prompt = "abcdefghijklmnopqrstuvwxyz"
    first = generate(script, prompt)
    again = generate(script, prompt)["meta_info"]["cached_tokens"]
    assert again > 0
    with attached.kv_offloaded() as freed:
        assert freed == KV_BYTES
        assert attached.memory().sum_of("kv") == 0
    answer = generate(script, prompt)
    assert answer["meta_info"]["cached_tokens"] == again
    assert answer["output_ids"] == first["output_ids"]
    with attached.kv_offloaded():
        attached.sync(kvpipe.open_checkpoint(script.MODEL))
    answer = generate(script, prompt)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert answer["output_ids"] == first["output_ids"]
    assert attached.memory().sum_of("kv") == KV_BYTES


def test_released_weights_come_back_unless_others_do(script, attached):
    whole = attached.memory()
    with attached.weights_released() as freed:
        assert freed == whole.sum_of("params") > 0
        assert attached.memory().sum_of("params") == 0
        with pytest.raises(kvpipe.EngineError, match="its weights are offloaded; restore them"):
            generate(script)
    assert generate(script)["output_ids"] == script.first
    with attached.weights_released():
        attached.sync(kvpipe.open_checkpoint(script.OTHER))
    assert generate(script)["output_ids"] != script.first
    with attached.weights_released(keep=False) as freed:
        assert freed == whole.sum_of("params")
    with pytest.raises(kvpipe.EngineError, match="its weights are dropped; swap others in first"):
        generate(script)
    with (
        pytest.raises(kvpipe.EngineError, match="the weights are not there"),
        attached.weights_released(),
    ):
        pass
    attached.sync(kvpipe.open_checkpoint(script.MODEL))
    assert generate(script)["output_ids"] == script.first
    assert attached.memory().pools == whole.pools


def test_arrays_of_the_devices_are_synced_there_and_have_the_files_digest(script, attached):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    named = kvpipe.open_checkpoint(script.MODEL)
    digest = attached.sync(named)
    assert digest != attached.sync(kvpipe.open_checkpoint(script.OTHER))
    mesh = attached._ctx.engine.runner.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    on_devices = {
        n: jax.device_put(jnp.asarray(a, "float32"), everywhere) for n, a in named.items()
    }
    assert attached.sync(on_devices) == digest
    assert generate(script)["output_ids"] == script.first
    name, array = next(iter(named.items()))
    for wrong, error, message in [
        ({n: a for n, a in named.items() if n != name}, kvpipe.WeightsError, name),
        (named | {name: array[:1]}, kvpipe.WeightsError, "has shape"),
        (named | {name: array.astype("float32") * float("nan")}, kvpipe.WeightsError, "not finite"),
        (named | {name: [1.0]}, kvpipe.InputError, "is of type list"),
        (
            named | {name: jax.device_put(array, jax.devices()[0])},
            kvpipe.InputError,
            "but the engine is on",
        ),
        (named | {name: on_devices[name]}, kvpipe.InputError, "give all arrays in one place"),
    ]:
        with pytest.raises(error, match=message):
            attached.sync(wrong)
    assert generate(script)["output_ids"] == script.first


class Garbage:
    """An object that only a garbage collection frees, and what it holds."""

    def __init__(self, held):
        self.itself, self.held = self, held


@pytest.mark.parametrize("verb", ["sync", "weights_released"])
@pytest.mark.parametrize("holds", ["nothing", "a leaf", "a shard"])
def test_garbage_of_the_callers_is_collected_only_if_it_holds_weights(
    script, attached, verb, holds
):
    from kvpipe.engine.params import parameters

    def make():
        leaf = next(iter(parameters(attached._ctx.engine).values()))
        if holds == "a shard":
            return weakref.ref(Garbage(leaf.addressable_shards[0].data))
        return weakref.ref(Garbage(leaf if holds == "a leaf" else None))

    attached.sync(own := kvpipe.open_checkpoint(script.MODEL))
    gc.disable()
    try:
        garbage = make()
        if verb == "sync":
            attached.sync(own)
        else:
            with attached.weights_released():
                pass
        assert (garbage() is None) == (holds != "nothing")
    finally:
        gc.enable()
    assert generate(script)["output_ids"] == script.first


def test_a_release_waits_for_the_requests_under_way_and_refuses_the_next(script, attached):
    """A request that was sent, and that the idle scheduler has not received, is under way too."""
    engine = attached._ctx.engine
    busy, go_on, released, leave = (threading.Event() for _ in range(4))

    def occupied():
        busy.set()
        assert go_on.wait(IDLE_TIMEOUT_S)

    def release():
        with attached.kv_released():
            released.set()
            assert leave.wait(IDLE_TIMEOUT_S)

    with ThreadPoolExecutor(2) as threads:
        held = threads.submit(engine.on_scheduler.call, occupied)
        assert busy.wait(IDLE_TIMEOUT_S)
        asked = asyncio.get_event_loop().create_task(
            script.engine.async_generate(input_ids=[72, 101], sampling_params=script.GREEDY)
        )
        until(lambda: engine.requests.on_the_way == 1)
        releasing = threads.submit(release)
        until(lambda: engine.unavailable)
        with pytest.raises(kvpipe.EngineError, match="or its weights are being changed"):
            generate(script)
        assert not released.is_set()
        go_on.set()
        answer = asyncio.get_event_loop().run_until_complete(asked)
        assert answer["meta_info"]["completion_tokens"] == 4
        assert released.wait(IDLE_TIMEOUT_S)
        leave.set()
        held.result()
        releasing.result()
    assert generate(script)["output_ids"] == script.first


def until(condition):
    """Run the main thread's event loop until a condition is true."""

    async def poll():
        while not condition():
            await asyncio.sleep(0.01)

    asyncio.get_event_loop().run_until_complete(asyncio.wait_for(poll(), IDLE_TIMEOUT_S))


def test_a_check_that_does_not_hold_raises_the_text_that_fails_a_run(script, attached, monkeypatch):
    from kvpipe.engine import kv_cache

    drop = kv_cache.drop

    def drop_less(engine):
        change = drop(engine)
        return type(change)(change.nbytes, change.changed_bytes + 4, fields=change.fields)

    monkeypatch.setattr(kv_cache, "drop", drop_less)
    why = "^step 'kv_cache_dropped': drop_frees_kv_bytes: expected 6297600, it was 6297596$"
    with pytest.raises(kvpipe.CheckFailed, match=why), attached.kv_released():
        pass
    assert generate(script)["output_ids"] == script.first


def test_recorded_verbs_give_a_report_and_a_comparison(script, attached, tmp_path, request):
    own = kvpipe.open_checkpoint(script.MODEL)
    for name in ("one", "two"):
        with kvpipe.record(attached, tmp_path / name, experiment="mine"):
            for _ in range(2):
                with attached.kv_released():
                    attached.sync(own)
    run = read_run(tmp_path / "one")
    cycle = ["flush_cache", "kv_cache_dropped", "weights_streamed", "kv_cache_rebuilt"]
    assert [phase.phase for phase in run.phases] == [*cycle, *(f"{step}#2" for step in cycle)]
    assert [phase.ledger.get("kv", 0) for phase in run.phases[:4]] == [KV_BYTES, 0, 0, KV_BYTES]
    assert all(phase.checks and phase.passed for phase in run.phases if phase.use != "flush_cache")
    assert run.phases[2].fields["weights_digest"] == attached._ctx.engine.proof.whole
    assert (run.status, run.config["engine"]["max_total_tokens"]) == ("passed", 1024)
    call = request.getfixturevalue("kvpipe")
    reported = call("report", str(tmp_path / "one"))
    assert (reported.code, reported.err) == (0, "")
    assert "kv_cache_dropped#2" in (tmp_path / "one/report.html").read_text()
    compared = call("compare", str(tmp_path / "one"), str(tmp_path / "two"))
    assert (compared.code, compared.err) == (0, "")
    assert "weights_streamed" in compared.out
    with (
        pytest.raises(kvpipe.InputError, match="belongs to an earlier run"),
        kvpipe.record(attached, tmp_path / "one"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), kvpipe.record(attached, tmp_path / "three"):
        with (
            pytest.raises(kvpipe.InputError, match="are recorded already"),
            kvpipe.record(attached, tmp_path / "four"),
        ):
            pass
        raise ZeroDivisionError("the train step failed")
    failed = read_run(tmp_path / "three").finished
    assert (failed.status, failed.error) == (
        "failed",
        "ZeroDivisionError: the train step failed",
    )


class Sampler:
    """Calls of tunix's SglangJaxSampler to its engine, with an event loop that stays open.

    tunix itself needs a later sglang-jax than the lock's.
    """

    def __init__(self, engine):
        self.engine = engine

    def __call__(self, input_strings, max_generation_steps):
        params = {"max_new_tokens": max_generation_steps, "temperature": 0.0, "ignore_eos": True}
        ids = [self.engine.tokenizer_manager.tokenizer(text)["input_ids"] for text in input_strings]
        asked = self.engine.async_generate(input_ids=ids, sampling_params=[params] * len(ids))
        answers = asyncio.get_event_loop().run_until_complete(asked)
        return [answer["output_ids"] for answer in answers]

    def update_params(self, leaves):
        """Give model and step other leaves, without informing kvpipe."""
        from kvpipe.engine.params import ParamTable

        scheduler = self.engine.scheduler_info["scheduler"]
        table = ParamTable(SimpleNamespace(runner=scheduler.tp_worker.worker.model_runner))
        table.put_in_step(leaves)
        table.update_model()


@pytest.mark.nightly(finds="calls of tunix's that the guide's example gets wrong")
def test_a_cycle_with_tunix_trains_without_a_kv_cache_and_generates_with_the_new_weights(
    script, attached
):
    from kvpipe.engine import weights

    names = {}
    exec(compile(CYCLE, "the cycle of attach.md", "exec"), names)
    sampler, engine = Sampler(script.engine), attached._ctx.engine
    trained = [weights.build(engine, kvpipe.open_checkpoint(script.OTHER))]
    seen = []

    def train_step(rollouts):
        assert attached.memory().sum_of("kv") == 0
        with pytest.raises(kvpipe.EngineError, match="its KV cache is dropped"):
            sampler(["Hello"], 4)
        seen.append(rollouts)
        return trained[0]

    for _ in range(2):
        names["cycle"](sampler, attached, ["Hello", "world"], train_step)
    assert seen[0][0][:4] == script.first
    assert seen[1][0] != seen[0][0]
    assert len({len(ids) for rollouts in seen for ids in rollouts}) == 1
    one_set = attached.memory().sum_of("params")
    trained.clear()
    with attached.weights_released() as freed:
        assert freed == one_set
    assert sampler(["Hello"], 8)[0] == seen[1][0]
    attached.sync(kvpipe.open_checkpoint(script.MODEL))
    assert generate(script)["output_ids"] == script.first


def test_a_detached_engine_is_as_before_and_can_be_attached_again(script):
    import psutil

    engine, before = script.engine, script.attached
    scheduler, manager = engine.scheduler_info["scheduler"], engine.tokenizer_manager
    hooked = [(scheduler, "process_input_requests"), (manager, "_send_one_request")]
    hooked.append((manager, "generate_request"))
    before.detach()
    for owner, name in hooked:
        assert getattr(owner, name) == getattr(type(owner), name).__get__(owner)
    assert psutil.Process.send_signal.__module__ == "psutil"
    assert generate(script)["output_ids"] == script.first
    for verb in (before.memory, before.detach, lambda: before.sync({})):
        with pytest.raises(kvpipe.EngineError, match="is detached; attach it again"):
            verb()
    rollout = SimpleNamespace(_sampler=Sampler(engine))
    seen = []
    cluster = SimpleNamespace(
        rollout=rollout, update_actor=lambda *args: seen.append(script.attached.memory().pools)
    )
    names = {"kvpipe": kvpipe, "cluster": cluster}
    exec(compile(CLUSTER, "the RLCluster of attach.md", "exec"), names)
    script.attached = names["attached"]
    cluster.update_actor("train_ds")
    assert [pools.get("kv") for pools in seen] == [None]
    assert script.attached.memory().sum_of("kv") == KV_BYTES


def test_an_engine_that_fails_raises_to_its_caller_and_signals_nobody(
    script, attached, monkeypatch
):
    sent = []
    monkeypatch.setattr("os.kill", lambda *args: sent.append(args))
    engine = attached._ctx.engine
    monkeypatch.setattr(script.engine.tokenizer_manager, "wait_timeout", 0.2)
    monkeypatch.setattr(engine.runner, "jitted_run_model", lambda *args: {}["the chip"])
    with pytest.raises(kvpipe.EngineError, match="the engine failed: KeyError: 'the chip'"):
        generate(script)
    for verb in (attached.memory, lambda: generate(script)):
        with pytest.raises(kvpipe.EngineError, match="KeyError: 'the chip'"):
            verb()
    assert sent == []
    assert engine.scheduler.cur_batch is not None
    hours = SimpleNamespace(perf_counter=itertools.count(0, 3600).__next__, sleep=seldom(3))
    monkeypatch.setattr("sgl_jax.srt.managers.scheduler.time", hours)
    with pytest.raises(StopIteration):
        engine.scheduler.watchdog_thread()


def seldom(times):
    """Return a ``sleep`` that returns at once, and raises StopIteration instead of the last time."""
    calls = iter(range(times - 1))
    return lambda seconds: next(calls)
