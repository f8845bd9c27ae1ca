"""The report page of a run, from its records: the verdict first, then the pictures, then numbers."""

from collections.abc import Sequence

from kvpipe.pipeline.ledger import is_contracted
from kvpipe.pipeline.output import difference
from kvpipe.records.run import PASSED, RECORDS_FILE, SKIPPED, Check, PhaseRecord
from kvpipe.report.config_changes import flat, value_text
from kvpipe.report.curves import CurvesChart, curves_of, training_table
from kvpipe.report.figures import (
    DevicesChart,
    host_chart,
    limit_bytes,
    memory_chart,
    memory_keys,
)
from kvpipe.report.rollouts import rollout_tables, rollouts_of
from kvpipe.report.run import UNFINISHED, Run
from kvpipe.report.tables import Cell, Table, number
from kvpipe.report.tokens import shortened
from kvpipe.units import counted

_SECTIONS = {
    "memory": "Memory after each phase",
    "checks": "Checks",
    "plan": "Planned and actual",
    "times": "Time and compilation",
    "training": "Training",
    "rollouts": "Rollouts",
    "texts": "Texts",
    "config": "Config",
    "versions": "Versions",
}


def report_page(run: Run) -> str:
    """Return the page of a run as HTML."""
    from kvpipe.report.render import rendered

    outputs = [phase for phase in run.phases if "token_ids" in phase.fields]
    results = [_compared(phase, outputs[0]) for phase in outputs]
    rollouts, curves = rollouts_of(run.phases), curves_of(run.phases)
    chart = memory_chart(run)
    return rendered(
        "run.html.j2",
        run=run,
        title=f"{run.title}: {run.status}",
        footer=f"Made by kvpipe from {RECORDS_FILE}.",
        sections={
            key: name
            for key, name in _SECTIONS.items()
            if {"texts": outputs, "training": curves, "rollouts": rollouts}.get(key, True)
        },
        tone={PASSED: "good", SKIPPED: "", UNFINISHED: ""}.get(run.status, "bad"),
        reason=_reason(run),
        error=_error(run),
        failed=[one for one in run.checks if not one[1].passed],
        checks=[one for one in run.checks if not _as_planned(one[1])],
        checks_as_planned=[one for one in run.checks if _as_planned(one[1])],
        memory=chart if any(bar.end for row in chart.rows for bar in row.bars) else None,
        legend=memory_keys(run),
        owners=owners_table(run.phases),
        sources={phase.memory.bytes_in_use_source for phase in run.phases},
        limit=limit_bytes(run),
        devices=DevicesChart.of(run),
        host=host_chart(run),
        outputs=outputs,
        results=results,
        curves=CurvesChart(run.experiment, curves),
        training=training_table(run.phases),
        rollouts=rollout_tables(rollouts),
        differences={
            phase.phase: list(shortened(outputs[0].fields["token_ids"], phase.fields["token_ids"]))
            for phase, result in zip(outputs, results, strict=True)
            if result.tone == "bad"
        },
        config=[(key, value_text(value)) for key, value in flat(run.config)],
        versions=run.started.versions if run.started else {},
    )


def owners_table(phases: Sequence[PhaseRecord]) -> Table | None:
    """Return the owners of the arrays of the pool ``other``, in the order of appearance.

    None for records that name no owner.
    """
    held: dict[str, list[tuple[str, int]]] = {}
    for phase in phases:
        for owner, nbytes in phase.other_bytes.items():
            held.setdefault(owner, []).append((phase.phase, nbytes))
    rows = [
        [
            Cell(codes=[owner]),
            Cell(codes=[seen[0][0]]),
            Cell(codes=[seen[-1][0]]),
            number(max(nbytes for _, nbytes in seen)),
        ]
        for owner, seen in held.items()
    ]
    columns = ["owner", "first after", "last after", "most bytes"]
    return Table("Arrays in no pool, by owner", columns, rows, texts=3) if rows else None


def _reason(run: Run) -> str:
    held = sum(check.passed for _, check in run.checks)
    started = run.started
    steps = len(started.steps) + len(started.skipped) if started else len(run.phases)
    ran = f"{len(run.phases)} of {counted(steps, 'phase')}"
    checks = f"{held} of {counted(len(run.checks), 'check')} passed."
    if run.finished is None:
        last = f" after {run.phases[-1].phase!r}" if run.phases else ""
        return f"The records end{last}: {ran}, {checks}"
    return f"{ran} in {run.finished.elapsed_s:.1f} s, {checks} {_bytes_verdict(run.phases)}"


def _bytes_verdict(phases: Sequence[PhaseRecord]) -> str:
    """Return whether the measured bytes are the planned ones."""
    compared = [phase for phase in phases if phase.plan_error_bytes]
    off = [
        phase.phase
        for phase in compared
        if any(n for pool, n in phase.plan_error_bytes.items() if is_contracted(pool))
    ]
    if off:
        return f"Measured bytes are not the planned ones after {', '.join(off)}."
    exact = (
        f"Parameters, KV cache and slots held the planned bytes, exactly, after each of "
        f"{counted(len(compared), 'phase')}."
    )
    return exact if compared else ""


def _error(run: Run) -> str | None:
    """Return the error of the run, unless a failed check says the same."""
    error = run.finished.error if run.finished else None
    failed = [check for _, check in run.checks if not check.passed]
    said = error and any(check.name in error or check.detail == error for check in failed)
    return None if said else error


def _as_planned(check: Check) -> bool:
    """Whether a check repeats a row of the table of planned and actual bytes."""
    return check.passed and check.name.startswith("plan/")


def _compared(phase: PhaseRecord, first: PhaseRecord) -> Cell:
    """Return how an output compares with the first one."""
    fields = phase.fields
    if phase is first:
        return Cell("the first")
    if fields["prompt_sha256"] != first.fields["prompt_sha256"]:
        return Cell("another prompt")
    if why := difference(first.fields["token_ids"], fields["token_ids"]):
        return Cell(why, tone="bad")
    return Cell("the same token ids", tone="good")
