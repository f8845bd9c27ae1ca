import mmap
import subprocess
import sys

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpipe.records.run import Memory
from kvpipe.system import process_memory as module
from kvpipe.system.process_memory import (
    child_memory,
    host_memory_bytes,
    oom_kills,
    process_memory,
)

HOLD = "held = bytes(range(256)) * (1 << 18); print('held', flush=True); input()"
OWN = (
    "from kvpipe.system.process_memory import process_memory;"
    "print(process_memory().process_peak_rss_bytes)"
)


def test_a_child_that_lives_has_a_resident_set_and_one_that_was_waited_for_only_a_peak():
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    alive = child_memory(child.pid)
    assert alive.process_peak_rss_bytes >= alive.process_rss_bytes > 64 << 20
    child.communicate("\n")
    ended = child_memory(child.pid)
    assert ended.process_rss_bytes == 0
    assert ended.process_peak_rss_bytes > 64 << 20


def test_a_peak_that_linux_puts_below_an_earlier_reading_is_not_believed(monkeypatch):
    """It stores an estimate: one of 16 steps of a tiny run had more than its process at its peak."""
    readings = iter([Memory(70, 70), Memory(60, 66), Memory(80, 80)])
    monkeypatch.setattr(module, "_memory", lambda pid, who: next(readings))
    monkeypatch.setattr(module, "_peak_rss_bytes", 0)
    measured = [process_memory() for _ in range(3)]
    assert measured == [Memory(70, 70), Memory(60, 70), Memory(80, 80)]


def test_no_measurement_of_a_process_is_above_its_peak_and_its_peak_never_falls():
    """The kernel's other sources disagree by some hundred kB."""
    held, measured = [], []
    for pages in range(1, 30):
        held.append(mmap.mmap(-1, pages << 12))
        held[-1].write(b"x" * (pages << 12))
        measured.append(process_memory())
        if pages % 3 == 0:
            held.pop(0).close()
    assert [m for m in measured if m.process_rss_bytes > m.process_peak_rss_bytes] == []
    peaks = [m.process_peak_rss_bytes for m in measured]
    assert peaks == sorted(peaks)


def test_the_peak_of_a_child_is_its_own_and_not_that_of_its_parent():
    """Linux counts the pages of the process that starts another into that one's maxrss."""
    held = mmap.mmap(-1, 256 << 20)
    held.write(bytes(256 << 20))
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, check=True)
    held.close()
    assert 0 < int(done.stdout) < 128 << 20


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vmstat", "nr_free_pages 1\noom_kill 3\ndrop_pagecache 0\n"),
        ("cgroups/memory.events", "low 0\noom 9\noom_kill 3\n"),
        ("cgroups/memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
    ],
)
def test_the_kills_for_memory_are_counted_wherever_linux_counts_them(
    tmp_path, monkeypatch, name, text
):
    monkeypatch.setattr(module, "_VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroups")
    assert oom_kills() == 0
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert oom_kills() == 3


# Linux writes "max", or in version 1 a number beyond any memory, where there is no limit.
LIMITS = st.one_of(
    st.none(), st.just("max"), st.just("9223372036854771712"), st.integers(1, 1 << 40)
)
# What the file says, and where the limits of its tree are.
VERSIONS = {
    1: (
        "5:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:{path}\n0::/other\n",
        "memory",
        "limit_in_bytes",
    ),
    2: ("1:name=systemd:/elsewhere\n0::{path}\n", ".", "max"),
}


@given(
    st.sampled_from(sorted(VERSIONS)),
    st.lists(LIMITS, min_size=1, max_size=4),
    st.integers(0, 3),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_least_limit_of_all_cgroups_above_a_process_is_its_hosts_memory(
    tmp_path_factory, version, limits, hidden
):
    """A container sees the tree from its own cgroup on; the file may still have the whole path."""
    text, below, name = VERSIONS[version]
    tree = tmp_path_factory.mktemp("tree")
    names = [f"cgroup{level}" for level in range(len(limits) - 1)]
    directory = tree / "cgroups" / below
    for level, limit in enumerate(limits):
        directory = directory / names[level - 1] if level else directory
        directory.mkdir(parents=True, exist_ok=True)
        if limit is not None:
            (directory / f"memory.{name}").write_text(f"{limit}\n")
    unseen = [f"unseen{level}" for level in range(hidden)] if not names else []
    (tree / "own").write_text(text.format(path="/" + "/".join([*unseen, *names])))
    (tree / "cgroups" / "cpu").mkdir(exist_ok=True)
    (tree / "cgroups" / "cpu" / f"memory.{name}").write_text("1\n")  # of another cgroup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CGROUPS", tree / "cgroups")
        patch.setattr(module, "_OWN_CGROUPS", tree / "own")
        numbers = [int(limit) for limit in limits if limit not in (None, "max")]
        assert host_memory_bytes() == min([psutil.virtual_memory().total, *numbers])


def test_a_system_without_cgroups_has_the_memory_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_OWN_CGROUPS", tmp_path / "none")
    assert host_memory_bytes() == psutil.virtual_memory().total
