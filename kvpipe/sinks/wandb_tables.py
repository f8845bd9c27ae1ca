"""The plan and the phases as rows of W&B tables, and the text of an alert.

Code that needs wandb is in :mod:`kvpipe.sinks.wandb`.
"""

from collections.abc import Sequence
from typing import Any

from kvpipe.pipeline.ledger import KV, PARAMS
from kvpipe.records.run import (
    SKIPPED,
    PhaseRecord,
    Record,
    RunFinished,
    RunPlanned,
    RunStarted,
)
from kvpipe.report.palette import pool_kinds
from kvpipe.report.rollouts import weights_of

PHASES_COLUMNS = (
    "phase",
    "duration_s",
    "params_bytes",
    "kv_bytes",
    "slots_bytes",
    "total_bytes",
    "peak_bytes",
    "rss_bytes",
    "compilations",
    "programs_loaded",
    "checks_failed",
)
ROLLOUT_COLUMNS = (
    "phase",
    "prompt",
    "sample",
    "text",
    "finish_reason",
    "new_tokens",
    "logprob",
    "weights_digest",
)
CHARTS = ("duration_s", "total_bytes", "peak_bytes")
"""Columns drawn as bar charts over the phases."""

_MOST_CHARS = 1000
_TITLE_CHARS = 63  # W&B's limit


def phase_row(record: PhaseRecord) -> list[Any]:
    """Return the row of a phase, in the order of :data:`PHASES_COLUMNS`."""
    held, peak = pool_kinds(record.ledger), record.peak
    return [
        record.phase,
        record.duration_s,
        *(held[kind] for kind in (PARAMS, KV, "slots")),
        held.total(),
        peak.bytes_in_use_total if peak else None,
        record.memory.process_rss_bytes,
        record.compilations,
        record.programs_loaded,
        sum(not check.passed for check in record.checks),
    ]


def rollout_rows(record: PhaseRecord) -> list[list[Any]]:
    """Return the rows of the samples in a record, in the order of :data:`ROLLOUT_COLUMNS`."""
    if "rollout_sha256" not in record.fields:
        return []
    return [
        [
            record.phase,
            *(sample[key] for key in ("prompt", "index", "text", "finish_reason")),
            len(sample["token_ids"]),
            sum(sample["logprobs"]),
            ", ".join(weights_of(sample)),
        ]
        for sample in record.fields["samples"]
    ]


def steps_taken(earlier: Sequence[Record]) -> int:
    """Return W&B's own next step after the parts of a run before it was resumed.

    W&B takes no row of a step before its last one. Each part begins where the one before may have
    ended: with one step for the tables at its end. In a part a row has the step of its phase's
    position, unless a row before it was of a later one.
    """
    first = following = 0
    for record in earlier:
        if isinstance(record, RunStarted):
            first = following = following + (1 if following else 0)
        elif isinstance(record, PhaseRecord):
            following = max(following, first + record.idx) + 1
    return following + 1


def plan_table(plan: RunPlanned) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the plan: the bytes of each pool after each phase."""
    pools = plan.pools
    columns = ["phase", *(f"{pool}_bytes" for pool in pools), "total_bytes", "max_device_bytes"]
    rows = [
        [
            phase.name,
            *(phase.pools.get(pool, 0) for pool in pools),
            phase.total_bytes,
            phase.max_device_bytes,
        ]
        for phase in plan.phases
    ]
    return columns, rows


def alert_of(experiment: str, record: RunFinished) -> tuple[str, str] | None:
    """Return the title and text of a run's alert.

    None if the run passed, was ended by a signal (so by a person), or was skipped by its own plan
    (so nothing was started).
    """
    if not 0 < record.exit_code < 128 or record.status == SKIPPED:
        return None
    failed = [
        f"{check.name}: {check.detail or 'not as expected'}"
        for check in record.checks
        if not check.passed
    ]
    text = "\n".join([record.error or "the run failed", *failed])
    return f"kvpipe {experiment} failed"[:_TITLE_CHARS], text[:_MOST_CHARS]
