import io
import json
from dataclasses import replace

from kvpipe.records.run import Fit, PlannedPhase, Program, RunPlanned
from kvpipe.report.plan import as_json, as_markdown
from kvpipe.report.plan_table import print_plan

PLAN = RunPlanned(
    target="v4:2x2x1",
    devices=4,
    sglang_jax="0.0.2",
    phases=(
        PlannedPhase("jax_ready", {}, 0, 0),
        PlannedPhase("engine_ready_dummy", {"params": 4_000, "kv": 8_000}, 12_000, 3_000),
        PlannedPhase("second", {"params": 4_000, "slot:second": 4_000}, 8_000, 2_000),
    ),
    fit=Fit(True, 34_359_738_368, "engine_ready_dummy", 131_072),
    elapsed_s=12.5,
)
MARKDOWN = """\
# Plan of `mine`

v4:2x2x1, 4 devices, sglang-jax 0.0.2. Bytes over all devices after each phase; the last column is \
of one device.

It fits: the peak is 3,000 of a device's 34,359,738,368 bytes after `engine_ready_dummy`; the \
largest `engine.max_total_tokens` that fits is 131072; compiled code, temporaries and the \
runtime's own memory are left out.

| phase | params | kv | slot:second | total | fullest device |
| --- | ---: | ---: | ---: | ---: | ---: |
| `jax_ready` |  |  |  | 0 | 0 |
| `engine_ready_dummy` | 4,000 | 8,000 |  | 12,000 | 3,000 |
| `second` | 4,000 |  | 4,000 | 8,000 | 2,000 |
"""


def test_the_json_has_exactly_the_keys_of_the_issue():
    assert as_json(PLAN) == {
        "target": "v4:2x2x1",
        "devices": 4,
        "sglang_jax": "0.0.2",
        "phases": [
            {"name": "jax_ready", "pools": {}, "total_bytes": 0, "max_device_bytes": 0},
            {
                "name": "engine_ready_dummy",
                "pools": {"params": 4_000, "kv": 8_000},
                "total_bytes": 12_000,
                "max_device_bytes": 3_000,
            },
            {
                "name": "second",
                "pools": {"params": 4_000, "slot:second": 4_000},
                "total_bytes": 8_000,
                "max_device_bytes": 2_000,
            },
        ],
        "fit": {
            "fits": True,
            "hbm_bytes": 34_359_738_368,
            "peak_phase": "engine_ready_dummy",
            "max_total_tokens": 131_072,
        },
        "warning": None,
    }


def test_the_json_can_be_read_back_as_a_plan():
    assert RunPlanned.from_json(json.loads(json.dumps(as_json(PLAN)))) == replace(
        PLAN, elapsed_s=0.0
    )


def test_the_markdown_is_exact_and_has_no_times():
    assert as_markdown("mine", PLAN) == MARKDOWN
    assert as_markdown("mine", replace(PLAN, elapsed_s=99.0)) == MARKDOWN


def test_the_markdown_of_a_plan_for_this_host_does_not_depend_on_its_memory():
    small = replace(PLAN, target="cpu", fit=replace(PLAN.fit, hbm_bytes=10**10))
    large = replace(small, fit=replace(PLAN.fit, hbm_bytes=10**12, max_total_tokens=10**9))
    assert as_markdown("mine", small) == as_markdown("mine", large)
    assert "It fits this host: the peak is 3,000 bytes a device" in as_markdown("mine", small)


def test_a_start_that_holds_more_than_it_leaves_is_the_peak_and_has_a_line_of_its_own():
    phases = (PLAN.phases[0], replace(PLAN.phases[1], peak_device_bytes=4_500), PLAN.phases[2])
    plan = replace(PLAN, phases=phases)
    assert [phase.get("peak_device_bytes") for phase in as_json(plan)["phases"]] == [
        None,
        4_500,
        None,
    ]
    text = as_markdown("mine", plan)
    assert (
        "the peak is 4,500 of a device's 34,359,738,368 bytes during `engine_ready_dummy`" in text
    )
    assert (
        "\n\n- `engine_ready_dummy` holds up to 4,500 bytes of a device while it runs\n\n|" in text
    )
    out = io.StringIO()
    print_plan("mine", plan, out)
    assert "engine_ready_dummy holds up to 4,500 bytes of a device" in out.getvalue()


def test_a_plan_that_does_not_fit_says_so():
    assert "It does not fit: the peak is 3,000 of a device's 2,000 bytes" in as_markdown(
        "mine", replace(PLAN, fit=Fit(False, 2_000, "engine_ready_dummy", 64))
    )


def test_the_table_for_a_terminal_sums_the_slots_and_names_every_phase_in_80_columns():
    wide = {"params": 8 * 2**30, "slot:a": 2**30, "slot:b": 2**30}
    name = "generate_result_after_kv_rebuild"
    phases = (*PLAN.phases, PlannedPhase(name, wide, 10 * 2**30, 5 * 2**29))
    out = io.StringIO()
    print_plan("mine", replace(PLAN, phases=phases), out)
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "mine on v4:2x2x1: GiB over 4 devices after each phase"
    row = next(line for line in lines if name in line)
    assert row.split() == [name, "8.000", "–", "2.000", "10.00", "2.500"]
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[-1].startswith("It fits: the peak is 3,000 of a device's 34,359,738,368 bytes")


def test_temporaries_and_the_programs_of_a_trainer_are_reported_where_they_were_compiled():
    programs = (
        Program("decode", 1, 1, 50, 7, 1.0),
        Program("train_step", 0, 0, 60, 9, 1.0),
    )
    pools = {"params": 4_000, "program": 200, "program:trainer": 240}
    phases = (PlannedPhase("train_step", pools, 4_440, 1_110, temp_bytes=9),)
    fit = Fit(True, 34_359_738_368, "train_step", 131_072, temp_bytes=9, micro_batch_size=4)
    plan = replace(PLAN, programs=programs, phases=phases, fit=fit)
    found = as_json(plan)
    assert found["fit"]["temp_bytes"] == found["phases"][0]["temp_bytes"] == 9
    assert found["fit"]["micro_batch_size"] == 4
    text = as_markdown("mine", plan)
    assert "the last two columns are of one device" in text
    assert "| total | fullest device | temporaries |" in text
    assert "| 4,440 | 1,110 | 9 |" in text
    assert (
        "`engine.max_total_tokens` that fits is 131072; the largest `trainer.micro_batch_size` that fits is 4;"
        in text
    )
    assert "the peak is 1,110 and 9 of temporaries of a device's 34,359,738,368 bytes" in text
    assert "- `decode` of 1 request and 1 token compiles: 50 bytes of code" in text
    assert "- `train_step` compiles: 60 bytes of code and 9 of temporaries a device" in text
    out = io.StringIO()
    large = replace(phases[0], pools=pools | _GIBS, total_bytes=4_000 + sum(_GIBS.values()))
    print_plan("mine", replace(plan, phases=(large,)), out)
    row = next(line for line in out.getvalue().splitlines() if line.split()[:1] == ["train_step"])
    assert row.split()[1:5] == ["0.000", "–", "–", "3.000"]


_GIBS = {"program": 1024**3, "program:trainer": 2 * 1024**3}
