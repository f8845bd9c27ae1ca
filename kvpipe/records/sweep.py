"""Records of a sweep: the summary of its jobs' records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvpipe.records.json_record import JsonRecord

SWEEP_FINISHED = "sweep_finished"
SWEEP_PAGE = "sweep.html"
"""Page of a sweep, in its directory."""


@dataclass(frozen=True)
class SweepJob:
    """A sweep's job, summarised from its records; None means unknown. Bytes are over all devices.

    Attributes:
        job: its number, from 0.
        values: swept key → the job's value, as it was given.
        overrides: all overrides of the job.
        status: as in :class:`RunFinished`, or ``unfinished`` if its records have no end, or
            ``not begun`` if there are none.
        exit_code: exit code of its run.
        run_dir: absolute path of its directory.
        taken_from: run directory of the earlier run whose records are reused; None if it ran.
        error: why it failed or was skipped.
        command: the command line that repeats this job alone.
        experiment: name of its experiment.
        max_total_tokens: capacity of its KV cache in tokens, in whole pages.
        kv_bytes: measured bytes of the KV cache after the first phase that has one.
        planned_kv_bytes: planned bytes of the KV cache after that phase.
        plan_error_bytes: measured minus planned bytes of the pool and phase with the largest
            difference, 0 if all are equal.
        freed_bytes: bytes that the first drop of the KV cache freed.
        fits: whether its plan fits the devices.
        largest_max_total_tokens: largest capacity that would fit, according to its plan.
        peak_bytes: most bytes in use, inside a phase or after one.
        rebuild_s: seconds of the first rebuild.
        same_output: whether every compared output was the same; None if none was compared.
        elapsed_s: seconds that the run took.
    """

    job: int
    values: Mapping[str, str]
    overrides: Sequence[str]
    status: str
    run_dir: str
    command: str
    exit_code: int | None = None
    taken_from: str | None = None
    error: str | None = None
    experiment: str | None = None
    max_total_tokens: int | None = None
    kv_bytes: int | None = None
    planned_kv_bytes: int | None = None
    plan_error_bytes: int | None = None
    freed_bytes: int | None = None
    fits: bool | None = None
    largest_max_total_tokens: int | None = None
    peak_bytes: int | None = None
    rebuild_s: float | None = None
    same_output: bool | None = None
    elapsed_s: float | None = None


@dataclass(frozen=True)
class SweepFinished(JsonRecord):
    """Summary of a sweep, from the records of its jobs.

    Attributes:
        experiment: names of the experiments.
        status: ``passed`` if every job passed or was skipped; else ``failed`` or ``interrupted``.
        exit_code: exit code of the process.
        sweep_dir: absolute path of the sweep's directory.
        swept: the keys whose values differ between jobs.
        jobs: the jobs, in order.
    """

    tag: ClassVar[str] = SWEEP_FINISHED

    experiment: str
    status: str
    exit_code: int
    sweep_dir: str
    swept: Sequence[str]
    jobs: Sequence[SweepJob]
