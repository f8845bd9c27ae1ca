"""Synthetic records of sweeps, for the tests of what is made of them."""

import json
from dataclasses import replace

from kvpipe.records.run import record_from_json
from kvpipe.records.sweep import SweepFinished, SweepJob
from tests.helpers_config import ROOT

RUNS = {tokens: ROOT / f"tests/data/tiny_runs/{tokens}.jsonl" for tokens in (1024, 2048)}
KEY = "engine.max_total_tokens"


def records_of(tokens):
    """Return the records of a committed run of the tiny model."""
    lines = RUNS[tokens].read_text().splitlines()
    return [record_from_json(json.loads(line)) for line in lines]


def job(number, tokens, **more):
    given = {
        "job": number,
        "values": {KEY: str(tokens)},
        "overrides": (f"{KEY}={tokens}",),
        "status": "passed",
        "run_dir": f"/sweeps/1/{number}",
        "command": f"python -m kvpipe {KEY}={tokens}",
        "exit_code": 0,
        "experiment": "tiny",
        "max_total_tokens": tokens,
        "kv_bytes": 3072 * tokens + 3072,
        "planned_kv_bytes": 3072 * tokens + 3072,
        "plan_error_bytes": 0,
        "freed_bytes": 3072 * tokens + 3072,
        "fits": True,
        "largest_max_total_tokens": 8_000_000,
        "peak_bytes": 30_000_000,
        "rebuild_s": 0.25,
        "same_output": True,
        "elapsed_s": 20.0,
    }
    return SweepJob(**given | more)


def unmeasured(number, tokens, **more):
    nothing = dict.fromkeys(
        (
            "kv_bytes",
            "plan_error_bytes",
            "freed_bytes",
            "peak_bytes",
            "rebuild_s",
            "same_output",
        )
    )
    return job(number, tokens, **nothing | more)


def failed(number, tokens, **more):
    return unmeasured(
        number, tokens, **{"status": "failed", "exit_code": 3, "error": "<it> broke\nbadly"} | more
    )


def off_the_plan(number, tokens, by):
    error = "engine_ready_dummy: the check 'plan/kv' failed"
    more = {"kv_bytes": 3072 * tokens + 3072 + by, "plan_error_bytes": by, "error": error}
    return job(number, tokens, status="failed", exit_code=1, **more)


def skipped(number, tokens):
    error = "the plan does not fit: step 'engine_ready_dummy' needs 2 bytes on a device"
    return unmeasured(number, tokens, status="skipped", exit_code=2, fits=False, error=error)


def sweep(*jobs, **more):
    """Return the record of a sweep of the tokens with these jobs."""
    given = {
        "experiment": "tiny",
        "status": "passed",
        "exit_code": 0,
        "sweep_dir": "/sweeps/1",
        "swept": (KEY,),
        "jobs": jobs,
    }
    return SweepFinished(**given | more)


def mixed():
    """Return a sweep in which everything has happened."""
    return sweep(
        job(0, 1024),
        replace(job(1, 2048), taken_from="/sweeps/0/7"),
        off_the_plan(2, 4096, by=512),
        failed(3, 8192),
        skipped(4, 1 << 30),
        status="failed",
        exit_code=1,
    )
