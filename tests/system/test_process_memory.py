import subprocess
import sys

import pytest

from kvpipe.system import process_memory
from kvpipe.system.process_memory import child_memory, oom_kills

HOLD = "held = bytes(range(256)) * (1 << 18); print('held', flush=True); input()"


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
    monkeypatch.setattr(process_memory, "_VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(process_memory, "_CGROUPS", tmp_path / "cgroups")
    assert oom_kills() == 0
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert oom_kills() == 3
