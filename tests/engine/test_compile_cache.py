"""Compiled programs on disk: what a later process loads, and that no fault of the disk reaches jax."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvpipe.engine.compile_cache import Store, keep_in
from tests.command import WITHOUT_JAX
from tests.fault_runs import disk

LARGE = 1 << 30
OF_JAX = "xla_gpu_per_fusion_autotune_cache_dir"  # jax's default


def sizes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in directory.iterdir()}


def test_an_entry_is_returned_as_it_was_put_and_another_key_has_none(tmp_path: Path) -> None:
    Store(tmp_path / "new" / "one", LARGE).put("jit_f-1", b"program")
    later = Store(tmp_path / "new" / "one", LARGE)
    assert (later.get("jit_f-1"), later.get("jit_f-2")) == (b"program", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[32:],  # as jax's own cache would write it
    ],
    ids=["cut", "empty", "a bit", "another format"],
)
def test_a_damaged_entry_is_missing_and_can_be_written_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store = Store(tmp_path, LARGE)
    store.put("key", b"program")
    (tmp_path / "key").write_bytes(damage((tmp_path / "key").read_bytes()))
    assert store.get("key") is None
    store.put("key", b"program")
    assert store.get("key") == b"program"


def test_the_least_recently_used_entries_go_first_and_what_a_killed_process_left(
    tmp_path: Path,
) -> None:
    (tmp_path / "tmp_of_a_killed_process").write_bytes(bytes(50))
    Store(tmp_path, LARGE).put("unused", bytes(68))
    Store(tmp_path, LARGE).put("used", bytes(68))
    for age, name in enumerate(["used", "unused", "tmp_of_a_killed_process"], start=1):
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    store = Store(tmp_path, max_bytes=300)
    assert store.get("used") == bytes(68)
    store.put("new", bytes(68))
    assert sizes(tmp_path) == {"unused": 100, "used": 100, "new": 100}
    store.put("newer", bytes(68))
    assert sizes(tmp_path) == {"used": 100, "new": 100, "newer": 100}


def test_an_entry_that_is_larger_than_all_may_be_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=100)
    store.put("large", bytes(69))
    assert (store.get("large"), sizes(tmp_path)) == (None, {})


def test_on_a_full_disk_nothing_is_kept_and_on_one_that_is_read_only_all_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with disk(tmp_path / "disk", 64 << 10):
        store = Store(tmp_path / "disk" / "cache", LARGE)
        store.put("before", b"program")
        for name in ("first", "second"):
            store.put(name, bytes(1 << 20))
        assert [*sizes(tmp_path / "disk" / "cache")] == ["before"]
        reported = capfd.readouterr().err.splitlines()
        assert len(reported) == 1
        assert reported[0].startswith("kvpipe: cannot write compiled programs: [Errno 28] No space")
        remount = ["mount", "-o", "remount,ro", str(tmp_path / "disk")]
        subprocess.run(remount, check=True)
        store.put("after", b"program")
        assert (store.get("before"), store.get("after")) == (b"program", None)


def test_a_directory_that_cannot_be_made_leaves_the_run_as_it_is_without(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "cache", LARGE)
    store.put("key", b"program")
    assert store.get("key") is None
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_processes_at_once_read_whole_entries_or_none_though_the_room_is_too_small(
    tmp_path: Path,
) -> None:
    """Each thread has a store of its own, as a process has; five of eight entries find room."""
    values = {f"key{n}": bytes([n]) * 968 for n in range(8)}

    def work(seed: int) -> set[bool]:
        store, names = Store(tmp_path, max_bytes=5000), list(values)
        found: set[bool] = set()
        for turn in range(60):
            name = names[(seed * 3 + turn * (seed + 1)) % len(names)]
            if (value := store.get(name)) is None:
                store.put(name, values[name])
            else:
                found.add(value == values[name])
        return found

    with ThreadPoolExecutor(4) as threads:
        found = set().union(*threads.map(work, range(4)))
    assert found == {True}
    assert not [name for name in sizes(tmp_path) if name not in values]


IN_A_PROCESS = """
import json, os, sys
from pathlib import Path
import jax, jax.numpy as jnp
from kvpipe.engine.compile_cache import keep_in
from kvpipe.engine.compile_count import CompileCounter

directory = Path(sys.argv[1])
keep_in(directory, int(sys.argv[2]))
counter, argument, counts = CompileCounter(), jax.device_put(3.0), {}
counter.take()

def turn(name):
    jax.clear_caches()
    result = jax.jit(lambda x: x * 2 + 1)(argument)
    taken = counter.take()
    counts[name] = [float(result), taken.count, taken.loaded]

turn("cold")
turn("warm")
for file in directory.glob("*"):
    file.write_bytes(file.read_bytes()[:-9])
turn("damaged")
turn("mended")
print(json.dumps(counts))
"""


@pytest.mark.parametrize(("max_bytes", "loaded"), [(1 << 20, 1), (0, 0)])
def test_jax_loads_what_it_has_compiled_before_and_compiles_what_is_damaged(
    tmp_path: Path, max_bytes: int, loaded: int
) -> None:
    environ = {k: v for k, v in WITHOUT_JAX.items() if not k.startswith("JAX_")}
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), str(max_bytes)]
    done = subprocess.run(
        command, env=environ | {"JAX_PLATFORMS": "cpu"}, check=True, capture_output=True, text=True
    )
    compiled = 1 - loaded
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "cold": [7.0, 1, 0],
        "warm": [7.0, compiled, loaded],
        "damaged": [7.0, 1, 0],
        "mended": [7.0, compiled, loaded],
    }
    assert len(list(tmp_path.iterdir())) == loaded


def test_a_program_has_the_same_key_before_and_after_the_engine_has_started(
    four_devices: None, tmp_path: Path
) -> None:
    """With jax's variable the engine's scheduler first sets options that are part of the key."""
    import jax
    from jax._src import compiler

    from kvpipe.engine import compat

    compat.import_engine()
    from sgl_jax.srt.managers.scheduler import Scheduler

    def options() -> bytes:
        return compiler.get_compile_options(1, 1).SerializeAsString()

    assert os.environ["JAX_COMPILATION_CACHE_DIR"]
    given = jax.config.jax_persistent_cache_enable_xla_caches
    jax.config.update("jax_persistent_cache_enable_xla_caches", OF_JAX)
    try:
        unset = options()
        keep_in(tmp_path, LARGE)
        before = options()
        nothing: Any = None
        with pytest.raises(AttributeError):  # it sets them before it looks at its arguments
            Scheduler(nothing, nothing)
        assert options() == before != unset
    finally:
        jax.config.update("jax_persistent_cache_enable_xla_caches", given)
