"""How a sweep's jobs are told in words, at a terminal and on the page."""

from collections import Counter

from kvpipe.records import PASSED, SKIPPED, SweepFinished, SweepJob

_RESULTS = {PASSED: "held", SKIPPED: "skipped"}
_MOST_CHARS = 300


def result_of(job: SweepJob) -> str:
    """Return how a job ended, in a word or two."""
    return _RESULTS.get(job.status, job.status)


def counts_told(sweep: SweepFinished) -> str:
    """Return how many jobs ended how, without a full stop."""
    counts = Counter(result_of(job) for job in sweep.jobs)
    taken = sum(job.taken_from is not None for job in sweep.jobs)
    told = ", ".join(f"{count} {result}" for result, count in counts.items())
    over = f"; {taken} taken over from earlier sweeps" if taken else ""
    return f"{len(sweep.jobs)} jobs: {told}{over}"


def reason_of(job: SweepJob) -> str:
    """Return in one line why a job did not hold."""
    line = " ".join((job.error or "its records do not say why").split())
    return line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]}…"
