"""Frozen records of a run: the only module that names their fields.

A run is a list of records: ``run_started``, one for each phase, ``run_planned`` before those of the
worker, and ``run_finished`` at the end. Sinks and reports read records and nothing else. Sizes are
bytes, times are seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, override

from kvpipe.records.json_record import JsonRecord, fields_of

RUN_STARTED = "run_started"
RUN_PLANNED = "run_planned"
RUN_FINISHED = "run_finished"
RUN_RECORDS = (RUN_STARTED, RUN_PLANNED, RUN_FINISHED)
"""Names of the records that are not of a phase."""
RECORDS_FILE = "records.jsonl"
ENGINE_LOG = "engine.log"
"""Log of the engine's process, in the run directory."""
PASSED = "passed"
FAILED = "failed"
INTERRUPTED = "interrupted"
SKIPPED = "skipped"
OWN_PHASE, OWN_SINK, OWN_REWARD = OWN_CODE = ("phase ", "sink ", "reward ")
"""Beginnings of the names in ``versions`` of phases, sinks and rewards that are not kvpipe's own."""
SUMMARY_FIELDS = (
    "bytes_in_use",
    "peak_bytes_in_use",
    "bytes_limit",
    "largest_free_block_bytes",
    "bytes_reserved",
)


@dataclass(frozen=True)
class RunStarted(JsonRecord):
    """The first record: the config and versions of the run.

    Attributes:
        experiment: name of the experiment.
        config: the resolved config as plain values, without secrets.
        steps: names of the steps, in order, with those of further cycles.
        versions: installed versions of Python, kvpipe and the packages that the run depends on;
            ``phase NAME``, ``sink NAME`` and ``reward NAME``, which are not kvpipe's own, have the
            file, or the package and its version, and the SHA-256 of the file.
        started_at: start of the run in UTC, ISO 8601.
        skipped: names of the steps that a resumed run skips, since the checkpoint has their
            results. The records before this one are theirs.
    """

    tag: ClassVar[str] = RUN_STARTED

    experiment: str
    config: Mapping[str, Any]
    steps: Sequence[str]
    versions: Mapping[str, str]
    started_at: str
    skipped: Sequence[str] = ()

    @override
    def _object(self) -> dict[str, Any]:
        return super()._object() | {"config": _finite(self.config)}


def _finite(value: Any) -> Any:
    """Return a config's value with ``inf`` and ``nan``, which JSON lacks, as strings."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Check:
    """One assertion of the run.

    Attributes:
        name: name of the assertion.
        expected: the required value.
        actual: the measured value.
        passed: whether the check passed.
        detail: more for the reader, e.g. the first differing token.
    """

    name: str
    expected: Any
    actual: Any
    passed: bool
    detail: str = ""


def check_equal(name: str, expected: Any, actual: Any, detail: str = "") -> Check:
    """Return the check that ``actual`` is exactly ``expected``."""
    return Check(name, expected, actual, expected == actual, detail)


@dataclass(frozen=True)
class Memory:
    """Memory that the probe measured.

    Attributes:
        process_rss_bytes: RSS of the process that ran the phase.
        process_peak_rss_bytes: its largest RSS so far.
        jax_device_memory_stats: the numeric statistics of each device.
        bytes_in_use_source: ``device`` if the backend has statistics, ``live_arrays`` if
            ``bytes_in_use`` is the sum of the live arrays, None without jax.
    """

    process_rss_bytes: int
    process_peak_rss_bytes: int
    jax_device_memory_stats: Sequence[Mapping[str, int]] = ()
    bytes_in_use_source: str | None = None

    @property
    def jax_device_memory_summary(self) -> dict[str, int]:
        """``<field>_{sum,min,max}`` over the devices for each field that every device has."""
        summary: dict[str, int] = {}
        for name in SUMMARY_FIELDS:
            values = [stats[name] for stats in self.jax_device_memory_stats if name in stats]
            if values and len(values) == len(self.jax_device_memory_stats):
                summary |= {
                    f"{name}_sum": sum(values),
                    f"{name}_min": min(values),
                    f"{name}_max": max(values),
                }
        return summary


@dataclass(frozen=True)
class Peak:
    """Peak memory use inside a phase, including its start and end.

    Attributes:
        bytes_in_use: largest bytes in use on each device, each at its own moment.
        bytes_in_use_total: largest sum over the devices sampled at one moment.
        process_rss_bytes: largest RSS.
        samples: number of samples inside the phase.
        source: as ``bytes_in_use_source`` of :class:`Memory`; None without jax.
        error: why a sample failed, so the peak may be too small; None if none failed.
    """

    bytes_in_use: tuple[int, ...]
    bytes_in_use_total: int
    process_rss_bytes: int
    samples: int
    source: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class PhaseRecord(JsonRecord):
    """Result of one phase and the memory after it.

    Attributes:
        phase: name of the step.
        use: name of the phase file.
        idx: position in the pipeline, from 0.
        elapsed_s: seconds since the run began.
        duration_s: seconds of the phase itself, with the devices synchronised.
        memory: the probe's measurement.
        peak: peak use inside the phase; None if it was not sampled.
        ledger: measured bytes over all devices, by pool.
        other_bytes: bytes of the ledger's pool ``other``, by owner.
        plan_error_bytes: measured minus planned bytes, by pool that the plan predicts exactly.
        compilations: programs that XLA compiled during the phase.
        compile_s: seconds of compiling and loading programs, summed over threads.
        programs_loaded: programs that jax loaded during the phase, as an earlier run compiled them.
        outside_s: seconds since the end of the worker's step before, in which no phase ran.
        checks: the phase's assertions.
        fields: values that the phase reports; they are top-level keys of the JSON line.
    """

    phase: str
    use: str
    idx: int
    elapsed_s: float
    duration_s: float
    memory: Memory
    peak: Peak | None = None
    ledger: Mapping[str, int] = field(default_factory=dict)
    other_bytes: Mapping[str, int] = field(default_factory=dict)
    plan_error_bytes: Mapping[str, int] = field(default_factory=dict)
    compilations: int = 0
    compile_s: float = 0.0
    programs_loaded: int = 0
    outside_s: float = 0.0
    checks: Sequence[Check] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def programs(self) -> int:
        """Programs that it needed anew, compiled or loaded."""
        return self.compilations + self.programs_loaded

    @property
    def bytes_in_use(self) -> int:
        """Bytes in use after it over all devices, as the devices count them if they do."""
        counted = self.memory.jax_device_memory_summary.get("bytes_in_use_sum", 0)
        return max(sum(self.ledger.values()), counted)

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes in use inside it over all devices; None if unknown."""
        return self.peak.bytes_in_use_total if self.peak and self.peak.bytes_in_use else None

    @override
    def _object(self) -> dict[str, Any]:
        if clash := sorted(self.fields.keys() & _PHASE_KEYS):
            raise ValueError(f"phase {self.phase!r} reports {clash}, which the record uses itself")
        memory = {_SUMMARY: self.memory.jax_device_memory_summary}
        return super()._object() | {"memory": fields_of(self.memory) | memory}

    @override
    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record of a phase; fields that an earlier version lacks have their defaults."""
        memory = {key: value for key, value in data["memory"].items() if key != _SUMMARY}
        if missing := _PHASE_KEYS - _LATER_KEYS - data.keys():
            raise KeyError(*sorted(missing))
        return super().from_json({**data, "memory": memory})


_PHASE_KEYS = {field.name for field in fields(PhaseRecord)} - {"fields"}
_LATER_KEYS = {"peak", "other_bytes", "programs_loaded", "outside_s"}
_SUMMARY = "jax_device_memory_summary"


@dataclass(frozen=True)
class PlannedPhase:
    """The plan's prediction after one phase.

    Attributes:
        name: name of the step.
        pools: bytes over all devices, by pool.
        total_bytes: bytes over all pools and devices, with the pool ``padding``: physical bytes,
            where every other pool has logical ones.
        max_device_bytes: bytes on the fullest device, physical ones.
        peak_device_bytes: most bytes on the fullest device while the phase runs, or after it; 0 if
            they are not predicted.
        temp_bytes: bytes of temporaries on a device while the step runs, activations among them; 0 if
            no program was compiled.
    """

    name: str
    pools: Mapping[str, int]
    total_bytes: int
    max_device_bytes: int
    peak_device_bytes: int = 0
    temp_bytes: int = 0

    @property
    def most_device_bytes(self) -> int:
        """The larger of the two: all that is known of the bytes on the fullest device."""
        return max(self.max_device_bytes, self.peak_device_bytes)


@dataclass(frozen=True)
class Fit:
    """Whether the plan fits the devices.

    Attributes:
        fits: whether no phase needs more than a device has.
        hbm_bytes: memory of one device, in bytes.
        peak_phase: the phase with the fullest device.
        max_total_tokens: largest KV cache capacity that would fit, 0 if none does.
        temp_bytes: bytes of temporaries on a device during the peak phase; they count towards it.
        reserve_bytes: bytes of a device that stay free for fragmentation.
        limited: whether ``hbm_bytes`` is ``plan.limit_bytes``.
        micro_batch_size: largest ``trainer.micro_batch_size`` that would fit, 0 if none does; None if
            ``plan.micro_batch`` does not ask for it.
    """

    fits: bool
    hbm_bytes: int
    peak_phase: str
    max_total_tokens: int
    temp_bytes: int = 0
    reserve_bytes: int = 0
    limited: bool = False
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class Program:
    """A program of the engine, the trainer or kvpipe, compiled ahead of time for a target.

    Attributes:
        name: ``prefill``, ``decode``, ``gradients``, ``train_step``, ``weight_sync``, ``kv_zeros``,
            ``kv_take``, ``kv_put`` or ``weight_digest``, which stands for one for each kind of
            parameter.
        requests: padded number of requests in the batch; 0 for all but the engine's.
        tokens: padded number of new tokens in the batch; 0 for all but the engine's.
        code_bytes: bytes of compiled code on each device, resident as long as the program.
        temp_bytes: bytes on each device, beside those of the ledger, while the program runs.
        compile_s: seconds of lowering and compiling.
        in_place_bytes: bytes of its inputs on each device that its outputs take over.
    """

    name: str
    requests: int
    tokens: int
    code_bytes: int
    temp_bytes: int
    compile_s: float
    in_place_bytes: int = 0


@dataclass(frozen=True)
class KvAction:
    """An action of ``kv: auto`` on the KV cache, and its cost each time.

    Attributes:
        action: ``keep``, ``shrink`` or ``drop``.
        chosen: whether the plan is with it.
        why_not: why it was not to be chosen; None if its plan fits and leaves the margin.
        fits: whether its plan fits.
        max_total_tokens: capacity of the cache that is left, in tokens; 0 if none is.
        peak_phase: the phase with the fullest device.
        peak_bytes: bytes of that device, with temporaries.
        free_bytes: bytes of it that stay free; less than 0 if it does not fit.
        freed_bytes: bytes of KV cache that come free, over all devices.
        remade_bytes: bytes of KV cache that are allocated again, over all devices.
        lost_tokens: most tokens of prefixes to prefill again that ``keep`` would not lose.
    """

    action: str
    chosen: bool
    why_not: str | None
    fits: bool = False
    max_total_tokens: int = 0
    peak_phase: str = ""
    peak_bytes: int = 0
    free_bytes: int = 0
    freed_bytes: int = 0
    remade_bytes: int = 0
    lost_tokens: int = 0


@dataclass(frozen=True)
class RunPlanned(JsonRecord):
    """The plan; emitted before the worker's first phase record.

    Attributes:
        target: the machine, e.g. ``cpu`` or ``v4:2x2x1``.
        devices: number of devices.
        sglang_jax: version of the engine whose model gave the sizes.
        phases: the prediction after each phase.
        fit: whether it fits.
        programs: programs that were compiled for the target; empty if nothing was.
        padded: whether the padding of the target's devices is known, or they pad nothing.
        warning: why a plan that fits may not fit after all; None if it leaves a margin.
        kv_actions: actions on the KV cache, the smallest first; empty if the config says it.
        elapsed_s: seconds since the run began.
    """

    tag: ClassVar[str] = RUN_PLANNED

    target: str
    devices: int
    sglang_jax: str
    phases: Sequence[PlannedPhase]
    fit: Fit
    programs: Sequence[Program] = ()
    padded: bool = True
    warning: str | None = None
    kv_actions: Sequence[KvAction] = ()
    elapsed_s: float = 0.0

    @property
    def peak(self) -> PlannedPhase:
        """The phase with the fullest device."""
        return next(phase for phase in self.phases if phase.name == self.fit.peak_phase)

    @property
    def needed_device_bytes(self) -> int:
        """Bytes that the fullest device needs, with temporaries."""
        peak = self.peak
        return max(peak.max_device_bytes + self.fit.temp_bytes, peak.peak_device_bytes)

    @property
    def pools(self) -> list[str]:
        """Every pool, in the order in which they are first filled."""
        return list(dict.fromkeys(pool for phase in self.phases for pool in phase.pools))


@dataclass(frozen=True)
class RunFinished(JsonRecord):
    """The last record: how the run ended.

    Attributes:
        status: ``passed``, ``failed``, ``interrupted`` (by a signal) or ``skipped`` (the plan does
            not fit, so nothing was started).
        exit_code: exit code of the process.
        run_dir: absolute path of the run directory.
        elapsed_s: seconds that the run took.
        checks: every check of the run, in order.
        error: why the run failed, in one message; None if it passed.
        failing_phase: the step that failed first, or ``run_planned`` for a failure before the
            worker's first step; None if it passed.
        ledger: measured bytes over all devices, by pool, after the failing step or, failing that,
            after the last measured one.
        planned: the plan's prediction after the failing step; None if there is none.
        command: the command line that repeats the run.
        fields: more about the run, e.g. the directory of W&B.
    """

    tag: ClassVar[str] = RUN_FINISHED

    status: str
    exit_code: int
    run_dir: str
    elapsed_s: float
    checks: Sequence[Check] = ()
    error: str | None = None
    failing_phase: str | None = None
    ledger: Mapping[str, int] = field(default_factory=dict)
    planned: PlannedPhase | None = None
    command: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


Record = RunStarted | RunPlanned | PhaseRecord | RunFinished


def record_from_json(data: Mapping[str, Any], line: str | None = None) -> Record:
    """Return the record of any kind whose JSON object is ``data``; it keeps ``line``, if given."""
    kinds = {kind.tag: kind for kind in (RunStarted, RunPlanned, RunFinished)}
    record = kinds.get(data["phase"], PhaseRecord).from_json(data)
    if line is not None:
        vars(record)["line"] = line
    return record
