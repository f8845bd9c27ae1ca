"""A plan as JSON and as Markdown.

Both are exact and the same on every machine, so that a committed plan goes stale only when the plan
changes: no times, no dates, and no memory size of this host.
"""

from collections.abc import Sequence
from typing import Any

from kvpipe.pipeline.ledger import PADDING, PARAMS
from kvpipe.plan.fit import left_out
from kvpipe.plan.kv_choice import described
from kvpipe.plan.targets import CPU
from kvpipe.records.run import RunPlanned
from kvpipe.units import counted


def as_json(plan: RunPlanned) -> dict[str, Any]:
    """Return the plan as ``plan.format=json`` prints it.

    ``fit`` and the phases have ``temp_bytes``, and the plan ``programs``, only if programs were
    compiled, ``reserve_bytes`` only if any stay free, ``micro_batch_size`` only if it was asked for;
    ``kv_actions`` are there only if the plan chose one, and ``peak_device_bytes`` of a phase only if
    they are predicted.
    """
    known = plan.to_json()
    for phase in known["phases"]:
        if not phase["peak_device_bytes"]:
            del phase["peak_device_bytes"]
    for key in ("reserve_bytes", "limited"):
        if not known["fit"][key]:
            del known["fit"][key]
    if plan.fit.micro_batch_size is None:
        del known["fit"]["micro_batch_size"]
    shown = ["target", "devices", "sglang_jax", "phases", "fit", "warning"]
    if plan.kv_actions:
        shown.append("kv_actions")
    if plan.programs:
        shown.append("programs")
        for program in known["programs"]:
            del program["compile_s"]
    else:
        for holder in (known["fit"], *known["phases"]):
            del holder["temp_bytes"]
    return {key: known[key] for key in shown}


def as_markdown(experiment: str, plan: RunPlanned) -> str:
    """Return the plan as a small Markdown document; sizes are bytes."""
    # The same columns for each start; one without weights fills the KV cache first.
    pools = sorted(plan.pools, key=lambda pool: (pool == PADDING, pool != PARAMS))
    temporaries = ["temporaries"] if plan.programs else []
    heading = ["phase", *pools, "total", "fullest device", *temporaries]
    rows = [
        [
            f"`{phase.name}`",
            *(f"{phase.pools[pool]:,}" if pool in phase.pools else "" for pool in pools),
            f"{phase.total_bytes:,}",
            f"{phase.max_device_bytes:,}",
            *(f"{phase.temp_bytes:,}" for _ in temporaries),
        ]
        for phase in plan.phases
    ]
    padded = (
        f" The devices give small arrays more than these ask for: `{PADDING}`, which total and "
        "fullest device include."
        if PADDING in pools
        else ""
    )
    of_one = "the last two columns are" if temporaries else "the last column is"
    warned = plan.warning if plan.target != CPU else None
    lines = [*peaks(plan), *described(plan.kv_actions), *compiled(plan)]
    return "\n".join(
        [
            f"# Plan of `{experiment}`",
            "",
            f"{plan.target}, {counted(plan.devices, 'device')}, sglang-jax {plan.sglang_jax}. Bytes over all "
            f"devices after each phase; {of_one} of one device.{padded}",
            "",
            f"{verdict(plan)}.",
            "",
            *([f"Warning: {warned}.", ""] if warned else []),
            *(f"- {line}" for line in lines),
            *([""] if lines else []),
            *markdown_table(heading, rows),
            "",
        ]
    )


def peaks(plan: RunPlanned) -> list[str]:
    """Return one line for each phase whose predicted peak exceeds the bytes after it."""
    return [
        f"`{phase.name}` holds up to {phase.peak_device_bytes:,} bytes of a device while it runs"
        for phase in plan.phases
        if phase.peak_device_bytes > phase.max_device_bytes
    ]


def compiled(plan: RunPlanned) -> list[str]:
    """Return one line for each program that was compiled for the target."""
    lines = []
    for program in plan.programs:
        batch = f" of {counted(program.requests, 'request')} and {counted(program.tokens, 'token')}"
        sizes = f"{counted(program.code_bytes, 'byte')} of code and {program.temp_bytes:,} of temporaries"
        # Those of the trainer and of kvpipe have no batch.
        named = f"`{program.name}`{batch if program.requests else ''}"
        in_place = (
            f", {program.in_place_bytes:,} updated in place" if program.in_place_bytes else ""
        )
        lines.append(f"{named} compiles: {sizes} a device{in_place}")
    return lines


def verdict(plan: RunPlanned) -> str:
    """Return in one phrase whether the plan fits, its peak, and the largest KV cache that fits."""
    fit, needed = plan.fit, plan.needed_device_bytes
    during = needed > plan.peak.max_device_bytes + fit.temp_bytes
    when = f"{'during' if during else 'after'} `{fit.peak_phase}`"
    fits = "fits" if fit.fits else "does not fit"
    temporaries = f" and {fit.temp_bytes:,} of temporaries" if fit.temp_bytes else ""
    rows = fit.micro_batch_size
    micro_batch = (
        "" if rows is None else f"; the largest `trainer.micro_batch_size` that fits is {rows}"
    )
    if plan.target == CPU:
        where = f"plan.limit_bytes={fit.hbm_bytes:,}" if fit.limited else "this host"
        return (
            f"It {fits} {where}: the peak is {needed - fit.temp_bytes:,} bytes{temporaries} a device "
            f"{when}{micro_batch}; {left_out(plan)}"
        )
    reserve = f" less {fit.reserve_bytes:,} for fragmentation" if fit.reserve_bytes else ""
    return (
        f"It {fits}: the peak is {needed - fit.temp_bytes:,}{temporaries} of a device's "
        f"{fit.hbm_bytes:,} bytes{reserve} {when}; the largest "
        f"`engine.max_total_tokens` that fits is {fit.max_total_tokens}{micro_batch}; "
        f"{left_out(plan)}"
    )


def markdown_table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1
) -> list[str]:
    """Return the lines of a Markdown table.

    The first ``texts`` columns hold text, the others are aligned as numbers.
    """
    rule = ["---" if column < texts else "---:" for column in range(len(heading))]
    return [f"| {' | '.join(cells)} |" for cells in (heading, rule, *rows)]
