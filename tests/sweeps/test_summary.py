"""Summary of the records of a sweep, whatever their state."""

import json
from pathlib import Path

import yaml

from kvpipe.sweeps.jobs import jobs_of
from kvpipe.sweeps.summary import summary_of
from tests.sweeps.sweep_records import KEY, RUNS

HYDRA = {
    "sweeper": {"params": None},
    "runtime": {
        "config_sources": [{"provider": "main", "schema": "pkg", "path": "conf"}],
        "choices": {"engine": "cpu"},
    },
}


def write_sweep(directory, *overrides, params=None, **runtime):
    """Write the config that Hydra leaves in a sweep's directory."""
    hydra = {
        **HYDRA,
        "sweeper": {"params": params},
        "runtime": HYDRA["runtime"] | runtime,
        "overrides": {"task": list(overrides)},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    return directory


def write_job(sweep, number, tokens, change=lambda lines: lines, run_dir=None):
    """Write the records of a committed run as those of a job, with changes."""
    folder = sweep / str(number)
    folder.mkdir()
    lines = [json.loads(line) for line in RUNS[tokens].read_text().splitlines()]
    lines[-1]["run_dir"] = str(run_dir or folder)
    text = "".join(json.dumps(line) + "\n" for line in change(lines))
    (folder / "records.jsonl").write_text(text)
    return folder


def renamed(name):
    """Return a change that gives a run another page size."""

    def change(lines):
        lines[0]["config"]["engine"]["page_size"] = name
        return lines

    return change


def test_a_sweep_has_the_numbers_of_its_runs(tmp_path):
    sweep = write_sweep(tmp_path / "s", f"{KEY}=1024,2048")
    for number, tokens in enumerate((1024, 2048)):
        write_job(sweep, number, tokens)
    found = summary_of(sweep)
    assert (found.status, found.exit_code, found.swept) == ("passed", 0, (KEY,))
    assert found.experiment == "tiny"
    first = found.jobs[0]
    assert (first.values, first.overrides) == ({KEY: "1024"}, (f"{KEY}=1024",))
    assert first.kv_bytes == first.planned_kv_bytes == first.freed_bytes == 3072 * 1025
    assert (first.same_output, first.fits, first.plan_error_bytes) == (True, True, 0)
    assert first.peak_bytes > first.kv_bytes


def test_the_capacity_is_in_whole_pages_as_the_engine_allocates_it(tmp_path):
    sweep = write_sweep(tmp_path / "s", f"{KEY}=1024,2048")
    for number, tokens in enumerate((1024, 2048)):
        write_job(sweep, number, tokens, renamed(1000))
    assert [job.max_total_tokens for job in summary_of(sweep).jobs] == [1000, 2000]


def without_end(lines):
    return lines[:5]


def test_what_did_not_end_or_begin_or_cannot_be_read_has_failed_and_says_why(tmp_path):
    sweep = write_sweep(tmp_path / "s", f"{KEY}=1,2,3,4,5")
    write_job(sweep, 0, 1024, without_end)
    (sweep / "1").mkdir()
    write_job(sweep, 2, 1024)
    write_job(sweep, 3, 1024, lambda lines: [{"phase": "a"}])
    found = summary_of(sweep)
    assert (found.status, found.exit_code) == ("failed", 1)
    assert [job.status for job in found.jobs] == [
        *("unfinished", "unfinished", "passed", "unfinished", "not begun")
    ]
    last = json.loads(RUNS[1024].read_text().splitlines()[4])["phase"]
    reported = [job.error for job in found.jobs]
    assert reported[:3] == [f"its records end after {last!r}", "it has left no records", None]
    assert "line 1: not a record of this version of kvpipe" in reported[3]
    assert reported[4] == "it has not begun"


def skipped(lines):
    lines[-1] |= {"status": "skipped", "exit_code": 2, "error": "the plan does not fit"}
    return lines


def test_a_skipped_job_is_no_failure(tmp_path):
    sweep = write_sweep(tmp_path / "s", f"{KEY}=1024,2048")
    write_job(sweep, 0, 1024)
    write_job(sweep, 1, 2048, skipped)
    assert (summary_of(sweep).status, summary_of(sweep).exit_code) == ("passed", 0)


def interrupted(lines):
    lines[-1] |= {"status": "interrupted", "exit_code": 143}
    return lines


def test_a_signal_gives_the_sweep_its_exit_code(tmp_path):
    sweep = write_sweep(tmp_path / "s", f"{KEY}=1024,2048,4096")
    write_job(sweep, 0, 1024)
    write_job(sweep, 1, 2048, interrupted)
    assert (summary_of(sweep).status, summary_of(sweep).exit_code) == ("interrupted", 143)


def test_a_sweep_that_was_moved_has_taken_over_nothing(tmp_path):
    sweep = write_sweep(tmp_path / "2026-01-02", f"{KEY}=1024,2048")
    write_job(sweep, 0, 1024, run_dir=Path("/vm/multirun/2026-01-02/0"))
    write_job(sweep, 1, 2048, run_dir=Path("/vm/multirun/2026-01-01/1"))
    assert [job.taken_from for job in summary_of(sweep).jobs] == [
        None,
        "/vm/multirun/2026-01-01/1",
    ]


def test_the_jobs_of_a_ready_sweep_are_its_parameters_unless_the_command_has_others(tmp_path):
    ready = {"params": {KEY: "1,2,3"}, "choices": {"sweep": "mine"}}
    jobs = jobs_of(write_sweep(tmp_path / "a", "+sweep=mine", **ready))
    assert [job.values[KEY] for job in jobs] == ["1", "2", "3"]
    # Chosen again, the ready sweep would make a sweep of the one job.
    assert jobs[0].command == f"python -m kvpipe hydra.mode=RUN {KEY}=1 +sweep=mine"
    others = jobs_of(write_sweep(tmp_path / "b", f"{KEY}=7,8", "+sweep=mine", **ready))
    assert [job.values[KEY] for job in others] == ["7", "8"]


def test_a_glob_over_choices_is_the_jobs_that_hydra_makes_of_it(tmp_path):
    jobs = jobs_of(write_sweep(tmp_path, "trainer=glob(bfloat16_*)"))
    assert [job.values["trainer"] for job in jobs] == ["bfloat16_gradients", "bfloat16_mu"]


def test_a_job_is_found_where_the_subdirectory_of_its_choice_is(tmp_path):
    sweep = write_sweep(tmp_path, f"{KEY}=1,2")
    for number in (0, 1):
        folder = sweep / f"by/name/{number + 5}"
        (folder / ".hydra").mkdir(parents=True)
        job = {"hydra": {"job": {"num": number}}}
        (folder / ".hydra/hydra.yaml").write_text(yaml.safe_dump(job))
    assert [job.directory.name for job in jobs_of(sweep)] == ["5", "6"]
