"""Fixtures that start real engines; they are shared, because each start and compile costs seconds.

The test process has four virtual CPU devices, so every engine here has tensor parallel 4.
"""

import itertools
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from kvpipe.checkpoints.safetensors import Tensors, open_checkpoint
from kvpipe.checkpoints.tiny import TinyModel, ensure
from kvpipe.config.schema import EngineConfig, SamplingConfig
from tests.in_process import Call, callable_in
from tools.mutants.copies import FEW_OPTIMIZATIONS

IDLE_TIMEOUT_S = 60.0
DEVICES = 4
ENGINE_FIXTURES = frozenset({"engine", "start_engine"})
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"

SMALL_ENGINE: dict[str, Any] = {
    "device": "cpu",
    "tp_size": DEVICES,
    "max_total_tokens": 1024,
    "context_length": 256,
    "max_running_requests": 2,
    "max_prefill_tokens": 128,
    "log_level": "error",
}

# The same for a run: what an engine here has compiled, the one of a run finds.
SIZES = [f"engine.{name}={value}" for name, value in SMALL_ENGINE.items() if isinstance(value, int)]

# The compiler takes as long for each layer, so what is about a run's own steps has one.
ONE_LAYER = "model.generate.num_hidden_layers=1"

# Of a rollout that trains while it is paused: 8 samples in 4 slots, so 4 are half-way and 4 wait.
SMALL_PAUSE = (
    "prompts.limit=4",
    "sampling.n=2",
    "sampling.max_new_tokens=8",
    "engine.max_running_requests=4",
    "phases.rollout_paused.pause_after_tokens=12",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=8",
)

StartEngine = Callable[..., AbstractContextManager[Any]]
own_programs = pytest.StashKey[str]()

# New examples in each run, in CI too. No limit on wall-clock time, and no database: a run depends
# on its seed and on nothing that an earlier one has left.
hypothesis.settings.register_profile(
    "kvpipe",
    database=None,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("kvpipe")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    """Start as from a terminal: what runs tests may ignore or block signals, for children too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)
    for signum in ends:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, *ends))
    # Most engines and runs here compile the same programs; jax keeps them on disk for the next one.
    # Only the first of pytest's processes makes the directory; the others inherit it.
    if PROGRAMS not in os.environ:
        config.stash[own_programs] = os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="kvpipe-jax-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # As an engine does when it starts: a program of this process has the same key before and after.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "all")
    os.environ.setdefault("XLA_FLAGS", FEW_OPTIMIZATIONS)
    # One seed for all of pytest's processes, so that the report can name it.
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = secrets.randbits(32)


def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores: while a test waits, another computes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_report_header(config: pytest.Config) -> str:
    """Name the option that draws the same random examples again."""
    return f"examples: --hypothesis-seed={config.option.hypothesis_seed}"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Mark tests that start an engine, refuse a nightly test without a reason, sort the files.

    Files that are marked ``early`` run first, then those that start most engines: they take longest,
    the rest takes seconds and evens the processes out. Marks need no table of measured times.
    """
    for item in items:
        if not ENGINE_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        for mark in item.iter_markers("nightly"):
            if mark.args or not mark.kwargs.get("finds"):
                raise pytest.UsageError(f"{item.nodeid}: say nightly(finds='a fault')")
    yield  # -m and -k take their tests out
    engines = Counter(item.path for item in items if item.get_closest_marker("slow"))
    early = {item.path for item in items if item.get_closest_marker("early")}
    items.sort(key=lambda item: (item.path not in early, -engines[item.path]))


def pytest_runtest_setup() -> None:
    """Undo what libraries do to this process when a test, or its collection, loads them.

    libtpu ignores SIGHUP, which children inherit. absl, which jax imports, closes the stream of its
    log handler when Hydra sets logging up anew; that may be the stream with which pytest captures.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if absl_logging := sys.modules.get("absl.logging"):
        absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what this process has made."""
    if made := config.stash.get(own_programs, None):
        shutil.rmtree(made)


@pytest.fixture
def kvpipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Call the command line in this process and in an empty directory; a run never begins."""
    with callable_in(tmp_path, monkeypatch, capfd) as call:
        yield call


@pytest.fixture(scope="session")
def four_devices() -> None:
    """Let jax find four virtual CPU devices, and leave the environment as it was."""
    before = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={DEVICES}"
    import jax

    assert jax.device_count() == DEVICES, "another test imported jax before this fixture"
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tests' generated checkpoints."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_dir(model_cache: Path) -> Path:
    """The default tiny Qwen2 checkpoint: 2 KV heads, tied embeddings, bfloat16."""
    return ensure(TinyModel(), model_cache)


@pytest.fixture(scope="session")
def tiny_weights(tiny_dir: Path) -> Tensors:
    """Its weights by Hugging Face name."""
    return open_checkpoint(tiny_dir)


@pytest.fixture
def start_engine(four_devices: None) -> StartEngine:
    """Start an engine of a test's own, with options over small defaults, for a with block.

    It ends with the block: an engine that waits takes time from every other thread.
    """
    from kvpipe.engine import sglang

    @contextmanager
    def start(model_dir: Path, **options: Any) -> Iterator[sglang.SglangEngine]:
        started = sglang.start(engine_config(**options), model_dir, IDLE_TIMEOUT_S)
        try:
            yield started
        finally:
            started.shut_down()

    return start


def engine_config(**options: Any) -> EngineConfig:
    """Return a small engine's options, with ``options`` over them."""
    return EngineConfig(**(SMALL_ENGINE | options))


@pytest.fixture(scope="module")
def engine(four_devices: None, tiny_dir: Path) -> Iterator[Any]:
    """A bfloat16 engine that was started without weights, shared by the tests of a module.

    To make random ones, only to replace them, would cost a second in each process. It ends with the
    module. Once the engine is imported, a start costs half a second; the threads of an idle engine
    cost a tenth of a core in all the tests after it.
    """
    from kvpipe.engine import empty_start

    shared = empty_start.start(engine_config(), tiny_dir, IDLE_TIMEOUT_S)
    yield shared
    shared.shut_down()


class RealWeights:
    """The checkpoint's weights in the shared engine, placed again only after a test that changed them.

    What is on the devices decides, not what a test says: the weights are unchanged if each parameter
    is the very array that was placed here, and if the devices hold as many bytes as they did then.
    An array that a test has read on the host keeps its shards as further arrays, which such a count
    finds. The references are weak, so that what a test replaces is freed as if nobody else knew it.
    """

    def __init__(self, engine: Any, weights: Tensors) -> None:
        self._engine = engine
        self._weights = weights
        self._placed: dict[str, weakref.ref[Any]] = {}
        self._in_use: tuple[int, ...] = ()

    def put_back(self) -> None:
        """Let the engine have the checkpoint's weights, a whole KV cache and no prefix."""
        from kvpipe.engine import kv_cache, memory, weights

        engine, capacity = self._engine, engine_config().max_total_tokens
        engine.flush()
        if kv_cache.KV not in engine.unavailable and engine.max_total_tokens != capacity:
            kv_cache.drop(engine)
        if kv_cache.KV in engine.unavailable:
            kv_cache.rebuild(engine, capacity)
        if not self._unchanged():
            weights.swap(engine, weights.build(engine, self._weights))
            placed = weights.parameters(engine)
            self._placed = {path: weakref.ref(array) for path, array in placed.items()}
            self._in_use = memory.bytes_in_use()

    def _unchanged(self) -> bool:
        from kvpipe.engine import memory, weights

        now = weights.parameters(self._engine)
        same = bool(self._placed) and all(
            self._placed[path]() is leaf for path, leaf in now.items()
        )
        return same and memory.used_now() == self._in_use


@pytest.fixture(scope="module")
def real_weights(engine: Any, tiny_weights: Tensors) -> RealWeights:
    """The checkpoint's weights, for the module's engine."""
    return RealWeights(engine, tiny_weights)


@pytest.fixture
def real_engine(engine: Any, real_weights: RealWeights) -> Any:
    """The shared engine with the checkpoint's weights, an empty prefix cache and a KV cache."""
    real_weights.put_back()
    return engine


def greedy(max_new_tokens: int) -> SamplingConfig:
    """Return greedy sampling of exactly ``max_new_tokens`` tokens."""
    return SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)


@contextmanager
def busy(engine: Any) -> Iterator[Callable[[], None]]:
    """Keep the engine in the middle of a request; gives what lets it go on, as the end does.

    The engine's own thread waits after the first decode step, however fast the machine is.
    """
    reached, go_on, run_batch = threading.Event(), threading.Event(), engine.scheduler.run_batch
    steps = itertools.count()

    def held(batch: Any) -> Any:
        if next(steps) == 2:
            reached.set()
            go_on.wait(IDLE_TIMEOUT_S)
        return run_batch(batch)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as thread:
        patch.setattr(engine.scheduler, "run_batch", held)
        generating = thread.submit(engine.generate, "Hello", greedy(6))
        try:
            assert reached.wait(IDLE_TIMEOUT_S)
            yield go_on.set
        finally:
            go_on.set()
        assert len(generating.result().token_ids) == 6
