"""A plan as JSON and as Markdown.

Both are exact and the same on every machine, so that a committed plan goes stale only when the plan
changes: no times, no dates, and of a plan for this host not the host's own memory.
"""

from collections.abc import Sequence
from typing import Any

from kvpipe.plan.fit import left_out
from kvpipe.plan.targets import CPU
from kvpipe.records.run import RunPlanned
from kvpipe.units import counted


def as_json(plan: RunPlanned) -> dict[str, Any]:
    """Return the plan as ``plan.format=json`` prints it.

    ``fit`` has ``temp_bytes`` only if programs were compiled.
    """
    known = plan.to_json()
    if not plan.programs:
        del known["fit"]["temp_bytes"]
    shown = ("target", "devices", "sglang_jax", "phases", "fit", "warning")
    return {key: known[key] for key in shown}


def as_markdown(experiment: str, plan: RunPlanned) -> str:
    """Return the plan as a small Markdown document; sizes are bytes."""
    pools = plan.pools
    heading = ["phase", *pools, "total", "fullest device"]
    rows = [
        [
            f"`{phase.name}`",
            *(f"{phase.pools[pool]:,}" if pool in phase.pools else "" for pool in pools),
            f"{phase.total_bytes:,}",
            f"{phase.max_device_bytes:,}",
        ]
        for phase in plan.phases
    ]
    warned = plan.warning if plan.target != CPU else None
    return "\n".join(
        [
            f"# Plan of `{experiment}`",
            "",
            f"{plan.target}, {counted(plan.devices, 'device')}, sglang-jax {plan.sglang_jax}. Bytes over all "
            "devices after each phase; the last column is of one device.",
            "",
            f"{verdict(plan)}.",
            "",
            *([f"Warning: {warned}.", ""] if warned else []),
            *(f"- {line}" for line in compiled(plan)),
            *([""] if plan.programs else []),
            *markdown_table(heading, rows),
            "",
        ]
    )


def compiled(plan: RunPlanned) -> list[str]:
    """Return one line for each of the engine's steps that was compiled for the target."""
    lines = []
    for program in plan.programs:
        batch = f" of {counted(program.requests, 'request')} and {counted(program.tokens, 'token')}"
        sizes = f"{counted(program.code_bytes, 'byte')} of code and {program.temp_bytes:,} of temporaries"
        # A trainer's programs have no batch.
        named = f"`{program.name}`{batch if program.requests else ''}"
        lines.append(f"{named} compiles: {sizes} a device")
    return lines


def verdict(plan: RunPlanned) -> str:
    """Return in one phrase whether the plan fits, its peak, and the largest KV cache that fits."""
    fit, peak = plan.fit, plan.peak
    fits = "fits" if fit.fits else "does not fit"
    if plan.target == CPU:
        return (
            f"It {fits} this host: the peak is {peak.max_device_bytes:,} bytes a device after "
            f"`{peak.name}`; {left_out(plan)}"
        )
    temporaries = f" and {fit.temp_bytes:,} of temporaries" if fit.temp_bytes else ""
    return (
        f"It {fits}: the peak is {peak.max_device_bytes:,}{temporaries} of a device's "
        f"{fit.hbm_bytes:,} bytes after `{peak.name}`; the largest `engine.max_total_tokens` that fits is "
        f"{fit.max_total_tokens}; {left_out(plan)}"
    )


def markdown_table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1
) -> list[str]:
    """Return the lines of a Markdown table.

    The first ``texts`` columns hold text, the others are aligned as numbers.
    """
    rule = ["---" if column < texts else "---:" for column in range(len(heading))]
    return [f"| {' | '.join(cells)} |" for cells in (heading, rule, *rows)]
