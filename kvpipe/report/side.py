"""One side of a comparison: a run, a plan, or a log of the script that kvpipe replaces.

The script wrote a JSON line for each phase among the lines of other logs, with the sum of the bytes
in use but without pools. Unknown figures are None and are not compared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpipe.errors import InputError
from kvpipe.pipeline.ledger import is_contracted
from kvpipe.records.run import RECORDS_FILE, RUN_RECORDS, PhaseRecord, RunPlanned
from kvpipe.report.run import phase_line, read_run, read_text, records_file

RUN, PLAN, SCRIPT = "run", "plan", "log of the script"


@dataclass(frozen=True)
class SidePhase:
    """The figures of a phase on one side; None is unknown.

    ``pools`` and ``total`` are bytes over all devices, ``fullest`` those of the fullest device, and
    ``peak`` the most in use inside the phase. The last two are of its output.
    """

    pools: Mapping[str, int] | None = None
    total: int | None = None
    fullest: int | None = None
    peak: int | None = None
    duration_s: float | None = None
    programs: int | None = None
    text_sha256: str | None = None
    token_ids: Sequence[int] | None = None

    def held(self, pool: str) -> int | None:
        """Return the bytes of a pool; 0 if a pool that plans hold to the byte is not named."""
        if self.pools is None:
            return None
        return self.pools.get(pool, 0 if is_contracted(pool) else None)


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        kind: :data:`RUN`, :data:`PLAN` or :data:`SCRIPT`.
        phases: its phases by name, in order.
        status: how a run ended; None of others.
        config: the resolved config; None if unknown.
        plan: the plan, of the kind :data:`PLAN`.
    """

    name: str
    kind: str
    phases: Mapping[str, SidePhase]
    status: str | None = None
    config: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: RunPlanned | None = None

    @property
    def label(self) -> str:
        """Its kind, and how a run ended."""
        return f"{self.kind}, {self.status}" if self.status else self.kind

    def phase(self, name: str) -> SidePhase:
        """Return the figures of a phase, all unknown if it has no such phase."""
        return self.phases.get(name, SidePhase())


def read_side(path: Path) -> Side:
    """Return the side of a run directory, its records, a plan or a log of the script.

    Raises:
        InputError: it is none of these, or a line of it is no record.
    """
    file = _file(path)
    text = read_text(file)
    if (plan := _plan(text, file)) is not None:
        return plan_side(str(path), plan)
    lines = [line for line in map(phase_line, text.split("\n")) if line]
    if not lines:
        raise InputError(
            f"{file}: it has no JSON line with a 'phase', so it is neither a run's records nor a "
            "log of the script; and it is no plan as plan.format=json writes it"
        )
    if any("use" in line or line["phase"] in RUN_RECORDS for line in lines):
        run = read_run(file)
        config, versions = (run.config, run.started.versions) if run.started else (None, {})
        phases = {phase.phase: _of_record(phase) for phase in run.phases}
        return Side(str(path), RUN, phases, run.status, config, versions)
    return Side(str(path), SCRIPT, {line["phase"]: _of_script_line(line) for line in lines})


def _file(path: Path) -> Path:
    """Return the file of a side: of a directory its records, or else its one log."""
    logs = sorted(path.glob("*.log"))
    if path.is_dir() and not (path / RECORDS_FILE).is_file() and len(logs) == 1:
        return logs[0]
    return records_file(path)


def _plan(text: str, file: Path) -> RunPlanned | None:
    """Return the plan if the text is one, None if it is something else."""
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if not isinstance(data, dict) or "phases" not in data or "fit" not in data:
        return None
    try:
        return RunPlanned.from_json(data)
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: not a plan: {type(error).__name__}: {error}") from None


def _of_record(phase: PhaseRecord) -> SidePhase:
    return SidePhase(
        pools=phase.ledger if phase.ledger else None,
        total=phase.bytes_in_use if phase.ledger else None,
        peak=phase.peak.bytes_in_use_total if phase.peak else None,
        duration_s=phase.duration_s,
        programs=phase.programs,
        text_sha256=phase.fields.get("text_sha256"),
        token_ids=phase.fields.get("token_ids"),
    )


def plan_side(name: str, plan: RunPlanned, config: Mapping[str, Any] | None = None) -> Side:
    """Return the side of a plan, with its config if that is known."""
    phases = {
        phase.name: SidePhase(phase.pools, phase.total_bytes, phase.max_device_bytes)
        for phase in plan.phases
    }
    versions = {"sglang-jax": plan.sglang_jax}
    return Side(name, PLAN, phases, config=config, versions=versions, plan=plan)


def _of_script_line(line: Mapping[str, Any]) -> SidePhase:
    memory = line.get("memory") or {}
    summary = memory.get("jax_device_memory_summary") or {}
    return SidePhase(
        total=summary.get("bytes_in_use_sum"),
        text_sha256=line.get("text_sha256"),
        token_ids=line.get("token_ids"),
    )
