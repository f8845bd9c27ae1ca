"""The picture and the table of docs/rl.md, from plans that are made up here."""

import importlib.util
import json
from xml.etree import ElementTree

import pytest

from tests.helpers_config import ROOT

GIB = 1024**3


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("frontier", ROOT / "docs/make_rl_frontier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(target, temp_gib, kept):
    """Return a plan of 4 devices of 16 GiB whose training step is the peak."""
    pools = {"params": 8 * GIB, "slot:a": 40 * GIB} | ({"kv": 8 * GIB} if kept else {})
    held = sum(pools.values()) // 4
    step = {"name": "train_step", "pools": pools, "max_device_bytes": held}
    return {
        "target": target,
        "devices": 4,
        "phases": [step | {"temp_bytes": temp_gib * GIB}],
        "fit": {
            "fits": held + temp_gib * GIB < 16 * GIB,
            "peak_phase": "train_step",
            "temp_bytes": temp_gib * GIB,
            "hbm_bytes": 16 * GIB,
            "max_total_tokens": 700_000 - 40_000 * temp_gib * kept,
        },
    }


@pytest.fixture(scope="module")
def plans(frontier):
    return [
        plan(target, size, kept)
        for target in frontier.MACHINES
        for size in (1, 2, 5)
        for kept in (False, True)
    ]


def test_each_plan_is_a_row_and_what_does_not_fit_is_said(frontier, plans):
    rows = frontier.table(frontier.points(plans)).splitlines()
    assert len(rows) == 2 + 9
    assert rows[2] == "| v4-8, 16 GiB | 512 | 1.00 | 13.00 | 15.00 | 700,000 | 660,000 |"
    assert rows[3] == (
        "| v4-8, 16 GiB | 2,048 | 2.00 | 14.00 | **16.00: does not fit** | 700,000 | 620,000 |"
    )
    assert rows[4].count("does not fit") == 2


def test_plans_in_another_order_than_the_sweeps_are_refused(frontier, plans):
    with pytest.raises(AssertionError, match="v4:2x2x1"):
        frontier.points([plans[1], plans[0], *plans[2:]])


def test_the_picture_has_a_point_for_each_plan_and_the_script_writes_it(
    frontier, plans, tmp_path, capsys
):
    (tmp_path / "plans.jsonl").write_text("\n".join(map(json.dumps, plans)))
    frontier.main(tmp_path / "plans.jsonl", tmp_path / "it.svg")
    assert "does not fit" in capsys.readouterr().out
    root = ElementTree.fromstring((tmp_path / "it.svg").read_text())
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len([circle for circle in circles if circle.get("r") == "4.5"]) == len(plans)


def test_a_sweep_of_fewer_machines_has_a_panel_for_each_and_all_lengths_are_needed(frontier, plans):
    two = frontier.points(plans[6:])
    shown = frontier.svg(two)
    assert [f"{name}, " in shown for name in frontier.MACHINES.values()] == [False, True, True]
    with pytest.raises(ValueError, match="shorter"):
        frontier.points(plans[:-2])


def test_the_picture_that_is_committed_has_the_machines_and_the_capacities_of_the_text(frontier):
    text = (ROOT / "docs/rl.md").read_text()
    shown = (ROOT / "docs/rl_frontier.svg").read_text()
    assert "(rl_frontier.svg)" in text
    for name in frontier.MACHINES.values():
        assert (f"{name}, " in shown) == (f"| {name}, " in text)
    kept = [row.split("|")[-2].strip() for row in text.splitlines() if row.startswith("| v5e-4, ")]
    assert len(kept) == len(frontier.LENGTHS)
    assert all(f">{tokens}<" in shown for tokens in kept)
