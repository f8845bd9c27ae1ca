"""``kvpipe run``, the default: execute the pipeline, alone or as a job of a sweep."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kvpipe.checkpoints.model_dir import check_cache_dir
from kvpipe.cli.common import checked_steps, input_error, notify, shown_format
from kvpipe.config.hosts import check_node_rank, is_first, own_file, with_node_rank
from kvpipe.config.hydra_errors import COMPOSITION_ERRORS
from kvpipe.config.jax_environment import jax_environment
from kvpipe.config.schema import Kvpipe, OutputFormat, TrackingMode, from_plain, to_plain
from kvpipe.config.wandb_environment import variable_messages, with_wandb_variables
from kvpipe.errors import HELD, InputError, TrackingError
from kvpipe.parent import resumption, supervisor
from kvpipe.parent.run_directory import RUN_DIR, owned, set_aside
from kvpipe.pipeline.phase import Phase
from kvpipe.pipeline.rewards import origins as reward_origins
from kvpipe.pipeline.steps import origins as phase_origins
from kvpipe.plan.continuation import skipped_names
from kvpipe.records.run import (
    ENGINE_LOG,
    FAILED,
    OWN_PHASE,
    OWN_REWARD,
    OWN_SINK,
    RECORDS_FILE,
    Record,
    RunFinished,
    RunStarted,
)
from kvpipe.sinks import Sink, Sinks
from kvpipe.sinks.failed_records import FailedRecords
from kvpipe.sinks.heartbeat import Heartbeat
from kvpipe.sinks.jsonl import JsonFile, JsonLines
from kvpipe.sinks.own import origins as sink_origins
from kvpipe.sinks.own import own_sinks
from kvpipe.sinks.report import ReportFile, write_page, write_timeline
from kvpipe.sinks.rollouts import RolloutFiles
from kvpipe.sinks.wandb import WandbSink
from kvpipe.sweeps.group import grouped
from kvpipe.sweeps.jobs import HYDRA_DIR, SWEEP_CONFIG, NoteSweep, command_line
from kvpipe.sweeps.resume import finished_run, take_over
from kvpipe.system.lock import InUse, cannot_write
from kvpipe.system.secrets import API_KEY, redactor, refuse_secrets, wandb_api_key
from kvpipe.system.versions import installed_versions


def act(composed: DictConfig) -> int:
    """Execute a run, after refusing everything that can be wrong with the input."""
    written = None
    try:
        plain = _completed(to_plain(composed))
        _refuse_secrets(plain)
        written = composed
        return _run(from_plain(plain), plain, composed)
    except (InputError, *COMPOSITION_ERRORS) as error:
        if not _is_job():
            _remove_made()
        elif not isinstance(error, InUse):
            _record_refusal(error, written)
        raise


def _completed(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the config with the values that Hydra does not compose: host's rank, names for W&B."""
    plain = with_wandb_variables(with_node_rank(plain, os.environ), os.environ)
    if plain["resume"] and _is_job():
        raise InputError("resume: it continues a single run; for a sweep set sweep.resume")
    plain = resumption.completed(plain, Path(HydraConfig.get().runtime.output_dir))
    if not _is_job():
        return plain
    hydra_config = HydraConfig.get()
    return grouped(plain, hydra_config.sweep.dir, hydra_config.overrides.task)


def _run(config: Kvpipe, plain: dict[str, Any], composed: DictConfig) -> int:
    planned = checked_steps(config)
    steps = [item.step for item in planned]
    check_node_rank(config.engine, os.environ)
    jax_environment(config.engine, os.environ)
    if _is_job():
        _refuse_hosts_in_a_sweep(config)
    if config.model.path is None and config.model.generate is not None:
        check_cache_dir(config)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    first = is_first(config.engine)
    api_key = _api_key(plain) if first else os.environ.get(API_KEY)
    redact = redactor(os.environ, api_key)
    started = _started(config, plain, steps)
    own = own_sinks(config.sinks, run_dir) if first else []
    resume = _is_job() and config.sweep.resume
    overwrite = config.runner.overwrite or resume or config.resume
    with owned(run_dir, config.engine, overwrite, notify):
        resumption.begin_anew(config, overwrite)
        _write_config(composed, run_dir)
        if resume and _taken_over(started, run_dir):
            return HELD
        earlier = resumption.earlier_records(run_dir) if config.resume else None
        if config.resume:
            set_aside(run_dir / ENGINE_LOG)
        for line in resumption.messages(config, planned):
            notify(f"kvpipe: {line}\n")
        tracker = WandbSink(config.tracking, run_dir, api_key, earlier)
        with _sinks(config, run_dir, [tracker, *own], earlier) as sinks:
            work = supervisor.Run(
                config,
                plain,
                started,
                steps,
                run_dir,
                sinks,
                start_tracking=(
                    partial(_start_tracking, tracker, plain, config) if first else dict
                ),
                command=_command(),
                resume_command=_resume_command(run_dir),
                redactor=redact,
            )
            finished = work.carry_out()
    if finished.exit_code and first and not _shown_live(config):
        notify(f"kvpipe: {finished.error}\n")
    return finished.exit_code


def _write_config(composed: DictConfig, run_dir: Path) -> None:
    """Write the composed config as Hydra does, but only once the run owns its directory."""
    hydra_config: Any = HydraConfig.instance().cfg
    parts = {
        "config.yaml": composed,
        "hydra.yaml": hydra_config,
        "overrides.yaml": hydra_config.hydra.overrides.task,
    }
    try:
        (run_dir / HYDRA_DIR).mkdir(exist_ok=True)
        for name, part in parts.items():
            OmegaConf.save(part, run_dir / HYDRA_DIR / name)
    except OSError as error:
        raise cannot_write(RUN_DIR, run_dir, error) from None


def _remove_made() -> None:
    """Remove the directories that Hydra has made for a run that is refused."""
    with suppress(OSError):
        for directory in NoteSweep.made:
            directory.rmdir()


def _start_tracking(tracker: WandbSink, plain: dict[str, Any], config: Kvpipe) -> dict[str, Any]:
    """Start the W&B run, after saying which variables of the environment are read for it.

    Raises:
        TrackingError: W&B is not available as configured, or began in another mode.
    """
    tracking = config.tracking
    if tracking.mode is not TrackingMode.disabled:
        for line in variable_messages(tracking, os.environ):
            notify(f"kvpipe: {line}\n")
    fields = tracker.start(plain)
    fell_back = fields["fallback"] and tracking.fallback_offline
    wanted = TrackingMode.offline if fell_back else tracking.mode
    if fields["mode"] != wanted.value:
        raise TrackingError(
            f"tracking.mode={tracking.mode.value}: W&B began as {fields['mode']!r}, not as "
            f"{wanted.value!r}"
        )
    return fields


@contextmanager
def _sinks(
    config: Kvpipe, run_dir: Path, others: Sequence[Sink], earlier: Sequence[Record] | None
) -> Iterator[Sink]:
    """Yield the receivers of the records: all sinks on rank 0, elsewhere those of a failed run.

    The ``others`` are W&B's and the user's own; ``earlier`` are the records that a resumed run continues.
    """
    if not is_first(config.engine):
        yield FailedRecords(run_dir / own_file(RECORDS_FILE, config.engine), sys.stderr)
        return
    with _records_file(run_dir, config.resume) as records:
        # Others first: the last record of the sinks after them must include an error at their end.
        # The picture before it, because W&B shows it.
        yield Sinks(
            [
                ReportFile(run_dir, write_timeline, earlier or ()),
                *others,
                ReportFile(run_dir, write_page, earlier or ()),
                RolloutFiles(run_dir),
                records,
                _screen(config.output),
                *_heartbeat(config),
            ],
            config.runner.sink_timeout_s,
        )


def _refuse_hosts_in_a_sweep(config: Kvpipe) -> None:
    """Refuse a job over several hosts, because ranks after 0 write no records for the sweep."""
    if config.engine.nnodes > 1:
        raise InputError(
            f"engine.nnodes is {config.engine.nnodes}, but a sweep's jobs run on one host each; "
            "start one run per size on the hosts instead"
        )


def _started(config: Kvpipe, plain: dict[str, Any], steps: Sequence[Phase]) -> RunStarted:
    return RunStarted(
        experiment=config.experiment,
        config=plain,
        steps=[step.step for step in steps],
        versions=installed_versions() | _own_code(config),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        skipped=skipped_names(config, steps),
    )


def _own_code(config: Kvpipe) -> dict[str, str]:
    """Return the origins of the phases, sinks and rewards that are not kvpipe's own."""
    found = {
        OWN_PHASE: phase_origins(config),
        OWN_SINK: sink_origins(config.sinks),
        OWN_REWARD: reward_origins(config),
    }
    return {f"{kind}{name}": str(at) for kind, each in found.items() for name, at in each.items()}


def _taken_over(started: RunStarted, run_dir: Path) -> bool:
    """Reuse a finished run's records for this job of a sweep, if there is one, and report it."""
    found = finished_run(started, run_dir, Path(HydraConfig.get().sweep.dir))
    if found is None:
        return False
    take_over(found, run_dir)
    notify(f"kvpipe: not run again, its records are taken over from {found}\n")
    return True


def _is_job() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _refuse_secrets(plain: dict[str, Any]) -> None:
    """Refuse a config that contains a secret, and remove the copies that Hydra has written.

    Hydra's callback sees a sweep's jobs only by their overrides, not by the files that they choose.
    """
    try:
        refuse_secrets(plain, redactor(os.environ, _api_key(plain)))
    except InputError:
        hydra_config = HydraConfig.get()
        if hydra_config.output_subdir is not None:
            shutil.rmtree(Path(hydra_config.runtime.output_dir) / hydra_config.output_subdir)
        if _is_job():
            (Path(hydra_config.sweep.dir) / SWEEP_CONFIG).unlink(missing_ok=True)
        raise


def _records_file(run_dir: Path, continues: bool = False) -> JsonFile:
    try:
        return JsonFile(run_dir / RECORDS_FILE, continues)
    except OSError as error:
        raise cannot_write(RUN_DIR, run_dir, error) from None


def _record_refusal(error: Exception, composed: DictConfig | None) -> None:
    """Write the record of a sweep's job that was refused before anything started.

    Its config is written too, unless it is None because it must not be.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if composed is not None:
        _write_config(composed, run_dir)
    refusal = input_error(error)
    redact = redactor(os.environ, None)
    refused = RunFinished(
        status=FAILED,
        exit_code=refusal.exit_code,
        run_dir=str(run_dir),
        elapsed_s=0.0,
        error=redact.text(str(refusal)),
        command=redact.text(_command()),
    )
    with _records_file(run_dir) as records:
        records.run_finished(refused)


def _command() -> str:
    """Return the command line that repeats this run, or this job of a sweep."""
    hydra_config = HydraConfig.get()
    return command_line(hydra_config, hydra_config.overrides.task)


def _resume_command(run_dir: Path) -> str:
    """Return the command line that continues this run after its checkpoint."""
    hydra_config = HydraConfig.get()
    given = [text for text in hydra_config.overrides.task if not text.startswith("resume=")]
    return command_line(hydra_config, [*given, f"hydra.run.dir={run_dir}", "resume=true"])


def _api_key(plain: dict[str, Any]) -> str | None:
    """Return the W&B API key; this directory's ``.env`` is read only if the key is needed."""
    if plain["tracking"]["mode"] == TrackingMode.online.value:
        return wandb_api_key(Path(HydraConfig.get().runtime.cwd), os.environ)
    return os.environ.get(API_KEY)


def _screen(output: OutputFormat) -> Sink:
    """Return the sink for stdout: a table for people, JSON lines for pipes."""
    if shown_format(output) is OutputFormat.json:
        return JsonLines(sys.stdout)
    from kvpipe.sinks.console import ConsoleTable

    return ConsoleTable()


def _heartbeat(config: Kvpipe) -> list[Sink]:
    """Return the heartbeat on stderr, unless a terminal shows the run live."""
    if _shown_live(config) or config.runner.heartbeat_s is None:
        return []
    return [Heartbeat(sys.stderr, config.runner.heartbeat_s)]


def _shown_live(config: Kvpipe) -> bool:
    """Whether a terminal shows the run and its error while it executes."""
    return config.output is not OutputFormat.json and sys.stdout.isatty()
