import mmap
import subprocess
import sys

import pytest

from kvpipe.system import process_memory as module
from kvpipe.system.process_memory import child_memory, oom_kills, process_memory

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
def test_the_kills_for_memory_are_counted_wherever_linux_tells_them(
    tmp_path, monkeypatch, name, text
):
    monkeypatch.setattr(module, "_VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroups")
    assert oom_kills() == 0
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert oom_kills() == 3
