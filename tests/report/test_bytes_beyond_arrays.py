"""Bytes that a device counts beyond its live arrays, e.g. compiled programs, are shown too."""

from kvpipe.records.run import Memory
from kvpipe.report.figures import BEYOND_ARRAYS, memory_chart
from kvpipe.report.run import run_of
from tests.sinks.pipeline_records import phase, started


def record(in_use: int):
    """Return a phase with 400 bytes of arrays, on two devices that count ``in_use`` each."""
    memory = Memory(1 << 30, 1 << 30, [{"bytes_in_use": in_use}] * 2, "device")
    return phase(5, memory=memory, peak=None, ledger={"kv": 300, "params": 100})


def parts_of(in_use: int):
    (row,) = memory_chart(run_of("r", [started(), record(in_use)])).rows
    return {part.name: part.size for part in row.bars[0].parts}


def test_bytes_beyond_the_arrays_count_and_have_a_part_of_the_bar():
    assert record(350).bytes_in_use == 700
    assert parts_of(350) == {"kv": 300, "params": 100, BEYOND_ARRAYS: 300}


def test_where_the_devices_count_no_more_than_the_arrays_there_is_no_such_part():
    assert record(200).bytes_in_use == 400
    assert parts_of(200) == {"kv": 300, "params": 100}
