"""A plan as a table for a terminal, in the unit that suits its largest size."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from kvpipe.pipeline.ledger import PADDING, PROGRAM
from kvpipe.plan.kv_choice import described
from kvpipe.records.run import PlannedPhase, RunPlanned
from kvpipe.report.palette import pool_kinds
from kvpipe.report.plan import compiled, peaks, verdict
from kvpipe.report.tables import NONE
from kvpipe.units import Unit, counted, unit_for


def print_plan(experiment: str, plan: RunPlanned, out: TextIO) -> None:
    """Print the ledger of an experiment's plan after each phase, and the verdict."""
    console = Console(file=out)
    unit = unit_for(max(phase.total_bytes for phase in plan.phases))
    devices = counted(plan.devices, "device")
    table = Table(
        title=f"{experiment} on {plan.target}: {unit.name} over {devices} after each phase",
        title_justify="left",
        box=None,
    )
    table.add_column("phase", no_wrap=True)
    columns = [
        "params",
        "kv",
        "slots",
        *(pool for pool in (PADDING, PROGRAM) if pool in plan.pools),
    ]
    for name in (*columns, "total", "fullest device"):
        table.add_column(name, justify="right", no_wrap=name != "fullest device")
    for phase in plan.phases:
        style = "bold" if phase.name == plan.fit.peak_phase else ""
        table.add_row(phase.name, *_cells(phase, columns, unit), style=style)
    console.print(table)
    for line in (*peaks(plan), *described(plan.kv_actions), *compiled(plan)):
        console.print(line.replace("`", ""), soft_wrap=True, highlight=False)
    # The terminal wraps, not rich: people copy names and numbers.
    line = f"{verdict(plan)} (sglang-jax {plan.sglang_jax})".replace("`", "")
    console.print(line, style="" if plan.fit.fits else "red", soft_wrap=True, highlight=False)
    if plan.warning:
        console.print(f"Warning: {plan.warning}", style="yellow", soft_wrap=True, highlight=False)


def _cells(phase: PlannedPhase, kinds: Sequence[str], unit: Unit) -> list[str]:
    held = pool_kinds(phase.pools)
    shown = [unit.of(held[kind]) if kind in held else NONE for kind in kinds]
    return [*shown, unit.of(phase.total_bytes), unit.of(phase.max_device_bytes)]
