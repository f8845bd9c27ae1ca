"""Send records to Weights & Biases.

The phase ``wandb_init`` starts the W&B run; a pipeline without that phase has none. This is the
only module that imports wandb, and it imports it only when a run starts, because that takes more
than a second. It must not swallow a failure of wandb: each becomes a :class:`TrackingError`.
"""

import html
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import psutil

from kvpipe.config.schema import TrackingConfig, TrackingMode
from kvpipe.config.wandb_environment import OWN_TO_THE_CONFIG
from kvpipe.errors import TrackingError
from kvpipe.records.metrics import metrics
from kvpipe.records.run import PhaseRecord, Record, RunFinished, RunPlanned, RunStarted
from kvpipe.report.run import run_of
from kvpipe.sinks import Handed, Sink
from kvpipe.sinks.report import TIMELINE_FILE
from kvpipe.sinks.texts import TABLE_COLUMNS, Sample, new_samples, summary_of
from kvpipe.sinks.wandb_file import Stored, lacking, read_stored
from kvpipe.sinks.wandb_log import upload_errors
from kvpipe.sinks.wandb_tables import (
    CHARTS,
    PHASES_COLUMNS,
    ROLLOUT_COLUMNS,
    alert_of,
    phase_row,
    plan_table,
    rollout_rows,
    steps_taken,
)
from kvpipe.system.secrets import API_KEY, redactor, refuse_secrets
from kvpipe.units import counted

if TYPE_CHECKING:
    import wandb

SAMPLES_DIR = "wandb_samples"
_PREFLIGHT_TIMEOUT_S = 5.0
# W&B enforces its limits in its service, which may itself be stuck; it gets this much longer.
_SERVICE_S = 5.0
_SERVICE = "wandb-core"
# A key of the summary that the start has set.
_ACKNOWLEDGED = "wandb/id"
# W&B's service flushes rows every 15 s by default, and loses the pending ones if it is killed.
_FLUSH_INTERVAL_S = 1.0
# It writes the last message to its file some milliseconds after the run has finished.
_FILE_POLL_S = 0.02
# Keys of tables and of a picture.
_PLAN, _TEXTS, _PHASES, _TIMELINE = "plan/phases", "sample_texts", "phases", "memory_timeline"
_ROLLOUTS = "rollout/samples"
# Settings of wandb that describe a run; those that the config does not give must be empty.
_OF_A_RUN = (
    "config_paths",
    "fork_from",
    "ignore_globs",
    "launch",
    "resume",
    "resume_from",
    "run_group",
    "run_id",
    "run_job_type",
    "run_name",
    "run_notes",
    "run_tags",
    "sweep_id",
)


class WandbSink(Sink):
    """Logs the records of a run to W&B, in ``run_dir/wandb``.

    The API key, required for ``online``, is passed to wandb and nowhere else. With ``earlier``, the
    records of the run before it was resumed, the W&B run of ``tracking.id`` is continued.
    """

    # Its limits are those of ``tracking``.
    limited = False
    # Its service answers after milliseconds, so a step need not wait for the answer.
    may_lag = True

    def __init__(
        self,
        tracking: TrackingConfig,
        run_dir: Path,
        api_key: str | None,
        earlier: Sequence[Record] | None = None,
    ) -> None:
        self._tracking = tracking
        self._run_dir = run_dir.absolute()
        self._api_key = api_key
        self._redactor = redactor(os.environ, api_key)
        self._run: wandb.Run | None = None
        self._handed: Handed | None = None
        self._unusable = False
        self._samples: list[Sample] = []
        self._prompt_file: str | None = None
        self._rows = 0
        self._planned = False
        self._next_step = 0
        self._experiment = ""
        self._phases: list[list[Any]] = []
        self._rollouts: list[list[Any]] = []
        self._earlier = earlier
        self._first_step = steps_taken(earlier) if earlier else 0
        self._next_step = self._first_step
        self._earlier_samples = 0

    def run_started(self, record: RunStarted) -> None:
        """Remember the rows and texts of the steps that a resumed run skips, for its tables."""
        for phase in run_of("", [*(self._earlier or ()), record]).phases:
            self._samples += new_samples(phase, self._samples)
            self._phases.append(phase_row(phase))
            self._rollouts += rollout_rows(phase)
        self._earlier_samples = len(self._samples)

    def start(self, config: dict[str, Any]) -> dict[str, Any]:
        """Start the W&B run with the resolved config; return the fields of its phase record.

        They are the actual project, name, url, id and mode, dir (where W&B writes), fallback
        (whether online failed and the run is offline instead) and fallback_reason.

        Raises:
            InputError: the config contains a secret.
            TrackingError: W&B is not available as configured.
        """
        if self._tracking.mode is TrackingMode.disabled:
            return _started(self._tracking, None, None)
        refuse_secrets(config, self._redactor)
        self._prompt_file = config["prompt"]["file"]
        self._experiment = config["experiment"]
        reason = None
        try:
            self._run = self._begin(self._tracking.mode, config)
        except TrackingError as error:
            online = self._tracking.mode is TrackingMode.online
            if not (online and self._tracking.fallback_offline):
                raise
            reason = str(error)
            self._run = self._begin(TrackingMode.offline, config)
        run, fields = self._run, _started(self._tracking, self._run, reason)

        def describe() -> None:
            run.summary.update({"wandb/url": fields["url"], _ACKNOWLEDGED: fields["id"]})
            # W&B's own step would count log calls, not phases.
            run.define_metric("*", step_metric="phase/idx")

        self._call("did not take the summary", describe)
        return fields

    def run_planned(self, record: RunPlanned) -> None:
        """Write the plan's verdict to the summary, and log the plan as a table.

        Raises:
            TrackingError: W&B rejected it.
        """
        if (run := self._run) is None:
            return

        def log() -> None:
            fit = {f"plan/{key}": value for key, value in asdict(record.fit).items()}
            run.summary.update(fit)
            # Logged with the row of the next phase.
            table = self._new_table(*plan_table(record))
            run.log({_PLAN: table}, step=self._next_step, commit=False)

        self._call("did not take the plan", log)
        self._planned = True

    def phase_finished(self, record: PhaseRecord) -> None:
        """Log the phase's metrics, and its texts if it has any.

        Raises:
            TrackingError: W&B rejected them.
        """
        if (run := self._run) is None:
            return
        samples = new_samples(record, self._samples)
        self._samples += samples
        self._rows += 1
        step = max(self._next_step, self._first_step + record.idx)
        self._next_step = step + 1
        self._phases.append(phase_row(record))
        self._rollouts += rollout_rows(record)

        def log() -> None:
            # Without commit a row waits for the next one, and is lost if there is none.
            run.log(metrics(record) | self._media(samples), step=step, commit=not samples)
            if samples:
                # Separately, because online W&B asks its server about a table, which may fail.
                run.log({_TEXTS: self._table()}, step=step, commit=True)
            self._upload(run, samples)
            run.summary.update(self._summary(record, samples))

        self._call(f"did not take the row of {record.phase!r}", log)

    def run_finishes(self, handed: Handed) -> None:
        """Remember what W&B must have at the end."""
        self._handed = handed

    def run_finished(self, record: RunFinished) -> None:
        """Log the table of phases and the result, alert if the run failed, and upload the rest.

        Raises:
            TrackingError: that failed, took longer than ``tracking.finish_timeout_s``, or W&B has
                not stored all of the run.
        """
        run, self._run = self._run, None
        if self._unusable:
            # That was reported when it happened, and another call would only wait again.
            _stop_service(stuck=True)
            return
        if run is None:
            return
        try:
            not_taken = self._log_end(run, record)
            self._finish(run, record)
        except TrackingError:
            _stop_service()
            raise
        if not_taken:
            raise not_taken
        if self._handed is not None:
            self._check_stored(run, self._handed.phases)

    def _check_stored(self, run: "wandb.Run", phases: Sequence[str]) -> None:
        """Read back W&B's file: a row for each phase, every table and picture, every text."""
        samples = self._samples[self._earlier_samples :]
        picture = self._run_dir / TIMELINE_FILE
        there = {_PHASES: True, _PLAN: self._planned, _TEXTS: samples, _TIMELINE: picture.is_file()}
        there[_ROLLOUTS] = self._rollouts
        media = [sample.key for sample in samples] + [
            key for key, is_there in there.items() if is_there
        ]
        texts = [f"{SAMPLES_DIR}/{run.id}/{sample.file_name}" for sample in samples]
        limit_s = self._tracking.finish_timeout_s

        def check() -> None:
            stored = _stored_at_end(_sync_dir(run) / f"run-{run.id}.wandb", limit_s)
            if lost := lacking(stored, Path(run.dir), phases, media, texts):
                raise TrackingError(lost)

        self._loud(run, "has not stored the whole run", check, limit_s + _SERVICE_S)

    def _log_end(self, run: "wandb.Run", record: RunFinished) -> TrackingError | None:
        """Log the table of phases, and alert if the run failed; the run is finished afterwards."""

        def log() -> None:
            if alert := alert_of(self._experiment, record):
                run.alert(*alert, level="ERROR")
            # W&B asks its server about a table first, which may hang if the server is lost.
            run.log(self._by_phase(), step=self._next_step, commit=True)

        limit_s = self._tracking.finish_timeout_s
        try:
            self._loud(run, "did not take the tables of the phases", log, limit_s)
        except TrackingError as error:
            return error
        return None

    def _finish(self, run: "wandb.Run", record: RunFinished) -> None:
        def finish() -> None:
            end = {"run/status": record.status, "run/exit_code": record.exit_code}
            run.summary.update(end)
            run.finish(exit_code=record.exit_code)
            if not any(_sync_dir(run).glob("*.wandb")):
                raise TrackingError("its files were removed or moved during the run")
            if lost := upload_errors(_sync_dir(run)):
                raise TrackingError(f"{counted(len(lost), 'upload')} failed: {lost[0]}")

        limit_s = self._tracking.finish_timeout_s + _SERVICE_S
        self._loud(run, "did not finish the run", finish, limit_s)

    def _begin(self, mode: TrackingMode, config: dict[str, Any]) -> "wandb.Run":
        if mode is TrackingMode.online and not self._api_key:
            raise TrackingError(
                f"tracking.mode=online: there is no W&B API key; set {API_KEY} in the environment "
                f"or in a .env with mode 600, or set tracking.mode=offline"
            )
        import wandb

        # A signal may interrupt the start, which then goes on in its thread.
        self._unusable = True
        limit_s = self._tracking.init_timeout_s + _SERVICE_S
        base_url = "its server"

        def begin() -> "wandb.Run":
            nonlocal base_url
            base_url = _base_url()
            if mode is TrackingMode.online:
                _reach(base_url, min(self._tracking.init_timeout_s, _PREFLIGHT_TIMEOUT_S))
            return wandb.init(
                project=self._tracking.project,
                name=self._tracking.name or config["label"],
                entity=self._tracking.entity,
                group=self._tracking.group,
                tags=self._tracking.tags,
                config=config,
                id=self._tracking.id,
                resume=None if self._earlier is None else "allow",
                # Do not continue a run that an earlier job of this process left unfinished.
                reinit="create_new",
                settings=self._settings(mode),
            )

        try:
            run = _within(limit_s, begin)
        except TrackingError:
            raise
        except (Exception, SystemExit) as error:
            _stop_service(stuck=isinstance(error, TimeoutError))
            raise TrackingError(self._not_begun(mode, base_url, error)) from error
        if mode is TrackingMode.online and not run.url:
            _stop_service()
            raise TrackingError(
                f"tracking.mode=online: {base_url} answered, but is not a W&B server; "
                f"check WANDB_BASE_URL, or set tracking.mode=offline"
            )
        self._unusable = False
        return run

    def _not_begun(self, mode: TrackingMode, base_url: str, error: BaseException) -> str:
        """Return the message for a start that failed; only an online one needs a server."""
        if mode is TrackingMode.online:
            place, remedy = f" at {base_url}", f"the network, {API_KEY} and tracking.project"
            other = TrackingMode.offline
        else:
            place, remedy = "", f"tracking.init_timeout_s and the free space of {self._run_dir}"
            other = TrackingMode.disabled
        return (
            f"tracking.mode={mode.value}: W&B{place} did not begin the run: {_first_line(error)}; "
            f"check {remedy}, or set tracking.mode={other.value}"
        )

    def _settings(self, mode: TrackingMode) -> "wandb.Settings":
        import wandb

        return wandb.Settings(
            mode=mode.value,
            api_key=self._api_key if mode is TrackingMode.online else None,
            root_dir=str(self._run_dir),
            init_timeout=self._tracking.init_timeout_s,
            finish_timeout=self._tracking.finish_timeout_s,
            finish_timeout_raises=True,
            x_skip_transaction_log=False,
            x_transaction_log_flush_interval=_FLUSH_INTERVAL_S,
            # stdout is for the records, and the upload must contain only what the config says.
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            # Copies rather than links, so that the run directory can be moved.
            symlink=False,
        )

    def _media(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the new texts as HTML pages, each with its size."""
        import wandb

        limit = self._tracking.text_max_chars
        media: dict[str, Any] = {}
        for sample in samples:
            page = f"<pre>{html.escape(sample.shown(limit))}</pre>"
            media[sample.key] = wandb.Html(page, inject=False, data_is_not_path=True)
            media |= sample.sizes(limit)
        return media

    def _table(self) -> "wandb.Table":
        limit = self._tracking.text_max_chars
        return self._new_table(TABLE_COLUMNS, [sample.row(limit) for sample in self._samples])

    def _by_phase(self) -> dict[str, Any]:
        """Return the tables of all phases and of rollouts' samples, bar charts, and the timeline."""
        import wandb

        logged: dict[str, Any] = {_PHASES: self._new_table(PHASES_COLUMNS, self._phases)}
        if self._rollouts:
            logged[_ROLLOUTS] = self._new_table(ROLLOUT_COLUMNS, self._rollouts)
        picture = self._run_dir / TIMELINE_FILE
        if picture.is_file():
            logged[_TIMELINE] = wandb.Image(str(picture))
        for column in CHARTS:
            # Each chart needs its own table, because W&B can log a table only once.
            table = self._new_table(PHASES_COLUMNS, self._phases)
            logged[f"by_phase/{column}"] = wandb.plot.bar(table, "phase", column, title=column)
        return logged

    def _new_table(self, columns: Sequence[str], rows: Sequence[list[Any]]) -> "wandb.Table":
        import wandb

        return wandb.Table(columns=list(columns), data=list(rows))

    def _upload(self, run: "wandb.Run", samples: Sequence[Sample]) -> None:
        """Write each whole text to a file, and upload the file to W&B."""
        folder = self._run_dir / SAMPLES_DIR / run.id
        for sample in samples:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / sample.file_name
            # Bytes, because text mode would change line endings and so the SHA-256.
            path.write_bytes(sample.text.encode())
            run.save(str(path), base_path=str(self._run_dir), policy="now", glob=False)

    def _summary(self, record: PhaseRecord, samples: Sequence[Sample]) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for sample in samples:
            summary |= summary_of(sample, self._prompt_file)
        if "same_output" in record.fields:
            summary["determinism/same_output"] = record.fields["same_output"]
        return summary

    def _call(self, what: str, work: Callable[[], None]) -> None:
        """Call wandb, and wait until its service has received the data."""
        run = self._run
        assert run is not None

        def acknowledged() -> None:
            work()
            # wandb only sends, and notices a service that has ended with a later call. Its service
            # answers in order, so its answer shows that it has taken everything before.
            run.summary[_ACKNOWLEDGED]

        self._loud(run, what, acknowledged, self._tracking.log_timeout_s)

    def _loud(self, run: "wandb.Run", what: str, work: Callable[[], None], limit_s: float) -> None:
        """Convert any exception of wandb to an error that says what may be lost."""
        try:
            _within(limit_s, work)
        except (Exception, SystemExit) as error:
            self._unusable = isinstance(error, TimeoutError)
            raise TrackingError(
                f"W&B {what}: {self._redactor.text(_first_line(error))}; up to "
                f"{counted(self._rows, 'row')} may be missing there; to upload what is on disk, run: "
                f"wandb sync {_sync_dir(run)}"
            ) from error


def find_server(timeout_s: float) -> str:
    """Connect to W&B's server and return its address.

    Raises:
        OSError: nothing listens there.
        TrackingError: W&B rejects its own settings.
    """
    base_url = _base_url()
    _reach(base_url, timeout_s)
    return base_url


def _started(
    tracking: TrackingConfig, run: "wandb.Run | None", reason: str | None
) -> dict[str, Any]:
    """Return the fields that say where W&B writes; without a run, W&B is disabled."""
    online = run is not None and not run.offline
    mode = TrackingMode.online if online else TrackingMode.offline
    return {
        "project": run.project if run else tracking.project,
        "name": run.name if run else tracking.name,
        "url": run.url if run and online else None,
        "id": run.id if run else None,
        "mode": (mode if run else TrackingMode.disabled).value,
        "dir": str(_sync_dir(run)) if run else None,
        "fallback": reason is not None,
        "fallback_reason": reason,
    }


def _within[T](timeout_s: float, work: Callable[[], T]) -> T:
    """Call ``work``; raise TimeoutError if it takes longer than ``timeout_s``."""
    done: Future[T] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except (Exception, SystemExit) as error:
            done.set_exception(error)

    # A daemon thread, so that a hanging call cannot keep this process alive.
    threading.Thread(target=do, name="kvpipe::wandb", daemon=True).start()
    try:
        return done.result(timeout_s)
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(f"no answer in {timeout_s:g} s") from None


def _stored_at_end(path: Path, limit_s: float) -> Stored:
    """Return the contents of W&B's file once the end of the run is in it."""
    from wandb.proto import wandb_internal_pb2

    made_at_import: Any = wandb_internal_pb2  # by protobuf: types do not know its classes
    parse = made_at_import.Record.FromString
    ends = time.monotonic() + limit_s
    while not (stored := read_stored(path, parse)).ended:
        if time.monotonic() > ends:
            raise TrackingError(f"{path} has no end record after {limit_s:g} s")
        time.sleep(_FILE_POLL_S)
    return stored


def _sync_dir(run: "wandb.Run") -> Path:
    return Path(run.dir).parent


def _first_line(error: BaseException) -> str:
    """Return wandb's message without the Python code that it suggests."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _base_url() -> str:
    """Return the address of W&B's server from wandb's own settings.

    They come from the environment and from wandb's files; the settings that describe a run are
    cleared.
    """
    import wandb
    from wandb.errors import UsageError

    _free_a_start_that_fails()
    hidden = {name: os.environ.pop(name) for name in OWN_TO_THE_CONFIG if name in os.environ}
    # The service of the process that started this one, which may have ended. wandb sets its own.
    os.environ.pop("WANDB_SERVICE", None)
    try:
        # Silent: anything that wandb would print is either raised here or irrelevant.
        # SageMaker's jobs would get their run id from wandb, the same for all jobs of a sweep.
        wanted = wandb.Settings(silent=True, sagemaker_disable=True)
        settings = wandb.setup(wanted).settings
        for name in _OF_A_RUN:
            setattr(settings, name, wandb.Settings.model_fields[name].default)
        return settings.base_url
    except Exception as error:
        if isinstance(error, wandb.Error) and not isinstance(error, UsageError):
            raise TrackingError(f"W&B's service did not start: {_first_line(error)}") from error
        raise TrackingError(
            f"W&B refuses its own settings, in the environment's WANDB_* or in its files: "
            f"{' '.join(str(error).split())}"
        ) from error
    finally:
        os.environ |= hidden


def _free_a_start_that_fails() -> None:
    """Make wandb's lock one that its holder can take again.

    While wandb 0.31.0 holds it, a service that does not start makes it take it a second time: that
    thread waited for ever, and each later run of this process for it. Remove this once
    ``wandb_setup._setup`` reports such a start after its lock is free.
    """
    from wandb.sdk import wandb_setup

    if isinstance(wandb_setup._singleton_lock, type(threading.Lock())):
        wandb_setup._singleton_lock = threading.RLock()


def _stop_service(stuck: bool = False) -> None:
    """Stop W&B's service after a failure, so that this process's next run gets a new one.

    Unless it is stuck, it may first write what it has.
    """
    import wandb

    if stuck:
        _kill_service()
    # The failure has been reported, and how a broken service stops adds nothing. wandb calls
    # sys.exit if the service is dead, which would end this process before its last record.
    with suppress(Exception, SystemExit):
        _within(_SERVICE_S, wandb.teardown)
    # wandb would wait for it when this process exits.
    _kill_service()
    # A killed service leaves its socket's directory behind, named after this process.
    for left in Path(tempfile.gettempdir()).glob(f"wandb-{os.getpid()}-*"):
        shutil.rmtree(left)


def _kill_service() -> None:
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(_SERVICE):
                child.kill()
                with suppress(psutil.TimeoutExpired):
                    child.wait(_SERVICE_S)


def _reach(base_url: str, timeout_s: float) -> None:
    """Raise OSError if nothing listens at ``base_url``, where W&B would retry until its timeout.

    Behind a proxy the host may be unreachable from here, so the check is skipped.
    """
    if getproxies():
        return
    url = urlsplit(base_url)
    port = url.port or (80 if url.scheme == "http" else 443)
    socket.create_connection((url.hostname or "", port), timeout_s).close()
