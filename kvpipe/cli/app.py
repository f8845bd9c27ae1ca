"""The command line: a verb, then Hydra overrides. The composition root; it must not name phases.

Exit codes: :data:`kvpipe.errors.EXIT_CODES`.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kvpipe.checkpoints.model_dir import check_model, check_shape
from kvpipe.config.hosts import check_hosts, is_first, node_rank, own_file
from kvpipe.config.hydra_errors import COMPOSITION_ERRORS, one_message, uncaught
from kvpipe.config.hydra_store import store_schema
from kvpipe.config.jax_environment import check_mesh, jax_environment
from kvpipe.config.prompt import read_prompt
from kvpipe.config.schema import (
    CompareConfig,
    CompareFormat,
    Kvpipe,
    OutputFormat,
    PlanFormat,
    TrackingMode,
    from_plain,
    to_plain,
)
from kvpipe.errors import CHECK_FAILED, DEFECT, HELD, SIGNALLED, InputError, KvpipeError
from kvpipe.parent.planner_client import Planners
from kvpipe.pipeline.phase import Phase
from kvpipe.pipeline.steps import build_steps, phase_names
from kvpipe.plan.fit import misfit
from kvpipe.plan.fold import check_order
from kvpipe.plan.targets import find_target
from kvpipe.records.run import FAILED, RECORDS_FILE, RunFinished, RunStarted
from kvpipe.records.sweep import SweepFinished
from kvpipe.report.plan import as_json, as_markdown
from kvpipe.sinks import Sink, Sinks
from kvpipe.sinks.heartbeat import Heartbeat
from kvpipe.sinks.jsonl import JsonFile, JsonLines
from kvpipe.suggest import nearest
from kvpipe.sweeps import slurm
from kvpipe.sweeps.group import grouped
from kvpipe.sweeps.jobs import SWEEP_CONFIG, NoteSweep, command_line, config_dir, is_sweep, jobs_of
from kvpipe.system.secrets import API_KEY, redactor, refuse_secrets, wandb_api_key
from kvpipe.system.versions import installed_versions

if TYPE_CHECKING:
    from kvpipe.report.comparison import Comparison

# Variable in which a shell passes the line to complete.
_COMP_LINE = "COMP_LINE"
_PLANNERS = Planners(secrets=(API_KEY,))


def main(argv: Sequence[str]) -> int:
    """Run the verb of a command line and return the exit code.

    Args:
        argv: the program's name, then the verb if there is one, then Hydra's arguments.

    Raises:
        SystemExit: help was asked for, a flag is unknown, or a signal ended a job of a sweep.
    """
    # Hydra would print its own message and exit 1; its errors are reported here, like all others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with _PLANNERS:
        try:
            return _told(lambda: _compose_and_act(argv[1:]))
        except Exception:
            # A defect must not look like a mistake of the person at the terminal: print the
            # traceback.
            _tell(traceback.format_exc())
            return DEFECT


def run(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Execute a run, after refusing everything that can be wrong with the input."""
    from kvpipe.parent import supervisor
    from kvpipe.sinks.wandb import WandbSink

    steps = _checked_steps(config)
    plain = plain | {"engine": plain["engine"] | {"node_rank": node_rank(config, os.environ)}}
    config = from_plain(plain)
    jax_environment(config.engine, os.environ)
    hydra_config = HydraConfig.get()
    if _is_job():
        _refuse_hosts_in_a_sweep(config)
        plain = grouped(plain, hydra_config.sweep.dir, hydra_config.overrides.task)
        config = from_plain(plain)
    run_dir = Path(hydra_config.runtime.output_dir)
    first = is_first(config.engine)
    api_key = _api_key(plain) if first else os.environ.get(API_KEY)
    redact = redactor(os.environ, api_key)
    started = _started(config, json.loads(redact.text(json.dumps(plain))), steps)
    if _is_job() and config.sweep.resume and _taken_over(started, run_dir):
        return HELD
    tracker = WandbSink(config.tracking, run_dir, api_key)
    with _sinks(config, run_dir, tracker) as sinks:
        work = supervisor.Run(
            config,
            plain,
            started,
            steps,
            run_dir,
            sinks,
            start_tracking=partial(tracker.start, plain) if first else dict,
            command=_command(),
            secrets=(API_KEY,),
            redactor=redact,
        )
        finished = work.carry_out()
    return finished.exit_code


@contextmanager
def _sinks(config: Kvpipe, run_dir: Path, tracker: Sink) -> Iterator[Sink]:
    """Yield the receivers of the records: all sinks on rank 0, only failed records on other hosts.

    Raises:
        InputError: the records file cannot be created.
    """
    from kvpipe.sinks.failed_records import FailedRecords
    from kvpipe.sinks.report import ReportPage, TimelinePicture

    if not is_first(config.engine):
        yield FailedRecords(run_dir / own_file(RECORDS_FILE, config.engine), sys.stderr)
        return
    with _records_file(run_dir) as records:
        # W&B first: the other sinks' last record must include an error that W&B has at the end.
        # The picture before it, because W&B shows it.
        yield Sinks(
            [
                TimelinePicture(run_dir),
                tracker,
                ReportPage(run_dir),
                records,
                _screen(config.output),
                *_heartbeat(config),
            ]
        )


def _refuse_hosts_in_a_sweep(config: Kvpipe) -> None:
    """Refuse a job over several hosts, because ranks after 0 write no records for the sweep.

    Raises:
        InputError: the job runs on several hosts.
    """
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
        versions=installed_versions(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _taken_over(started: RunStarted, run_dir: Path) -> bool:
    """Reuse a finished run's records for this job of a sweep, if there is one, and report it."""
    from kvpipe.sweeps.resume import finished_run, take_over

    found = finished_run(started, run_dir, Path(HydraConfig.get().sweep.dir))
    if found is None:
        return False
    take_over(found, run_dir)
    _tell(f"kvpipe: not run again, its records are taken over from {found}\n")
    return True


def _is_job() -> bool:
    """Whether this run is a job of a sweep."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _refuse_secrets(plain: dict[str, Any]) -> None:
    """Refuse a config that contains a secret, and remove the copy that Hydra has already written.

    Raises:
        InputError: it contains one.
    """
    try:
        refuse_secrets(plain, _api_key(plain))
    except InputError:
        hydra_config = HydraConfig.get()
        written = Path(hydra_config.runtime.output_dir) / ".hydra"
        if written.is_dir():
            shutil.rmtree(written)
        if _is_job():
            (Path(hydra_config.sweep.dir) / SWEEP_CONFIG).unlink(missing_ok=True)
        raise


def _records_file(run_dir: Path) -> JsonFile:
    """Return the records file.

    Raises:
        InputError: it cannot be created.
    """
    try:
        return JsonFile(run_dir / RECORDS_FILE)
    except OSError as error:
        raise InputError(f"hydra.run.dir: cannot write in {run_dir}: {error.strerror}") from None


def _command() -> str:
    """Return the command line that repeats this run, or this job of a sweep."""
    hydra_config = HydraConfig.get()
    return command_line(hydra_config, hydra_config.overrides.task)


def _api_key(plain: dict[str, Any]) -> str | None:
    """Return the W&B API key; this directory's ``.env`` is read only if the key is needed."""
    if plain["tracking"]["mode"] == TrackingMode.online.value:
        return wandb_api_key(Path(HydraConfig.get().runtime.cwd), os.environ)
    return os.environ.get(API_KEY)


def _screen(output: OutputFormat) -> Sink:
    """Return the sink for stdout: a table for people, JSON lines for pipes."""
    if _shown(output) is OutputFormat.json:
        return JsonLines(sys.stdout)
    from kvpipe.sinks.console import ConsoleTable

    return ConsoleTable()


def _shown(output: OutputFormat) -> OutputFormat:
    """Return the format of stdout, with ``auto`` resolved."""
    if output is not OutputFormat.auto:
        return output
    return OutputFormat.table if sys.stdout.isatty() else OutputFormat.json


def _heartbeat(config: Kvpipe) -> list[Sink]:
    """Return the heartbeat on stderr, unless a terminal shows the run live."""
    live = config.output is not OutputFormat.json and sys.stdout.isatty()
    if live or config.runner.heartbeat_s is None:
        return []
    return [Heartbeat(sys.stderr, config.runner.heartbeat_s)]


def _checked_steps(config: Kvpipe) -> tuple[Phase, ...]:
    """Return the steps after every input check that needs no jax."""
    steps = build_steps(config)
    check_order(steps)
    check_mesh(config.engine)
    check_hosts(config)
    check_model(config)
    read_prompt(config.prompt)
    return steps


def check(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Check the order of the steps by folding their declared effects, and print the result."""
    steps = _checked_steps(config)
    print(f"{config.experiment}: {len(steps)} steps, their order holds")
    return 0


def plan(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print or write the bytes after each phase on the target, and whether they fit.

    Raises:
        KvpipeError: they do not fit.
    """
    _checked_steps(config)
    check_shape(config)
    record = _PLANNERS.plan(config, plain, find_target(config.plan.target, config.engine))
    with _opened("plan.file", config.plan.file) as out:
        match config.plan.format:
            case PlanFormat.json:
                out.write(json.dumps(as_json(record)) + "\n")
            case PlanFormat.markdown:
                out.write(as_markdown(config.experiment, record))
            case PlanFormat.table:
                from kvpipe.report.plan_table import print_plan

                print_plan(config.experiment, record, out)
    if why := misfit(record):
        raise KvpipeError(why)
    return 0


@contextmanager
def _opened(key: str, file: str | None) -> Iterator[TextIO]:
    """Yield a stream to ``file``, the value of ``key``; without a file, stdout."""
    if file is None:
        yield sys.stdout
        return
    try:
        with Path(file).open("w", encoding="utf-8") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"{key}: cannot write {file}: {error.strerror}") from None


def compare_plans(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print the cost in bytes of changed files or overrides, experiment by experiment.

    Raises:
        KvpipeError: the cost exceeds the budget.
    """
    from kvpipe.parent import revisions
    from kvpipe.report.comparison_report import plans_as_markdown

    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices.get("experiment")
    with tempfile.TemporaryDirectory(prefix="kvpipe-compare-") as scratch:
        before, after = revisions.sides(
            config.compare_plans,
            _common_overrides(hydra_config.overrides.task),
            config_dir(hydra_config.runtime.config_sources),
            Path(scratch),
        )
        changes = revisions.changes(before, after, [chosen] if chosen else None)
    print(plans_as_markdown(changes, before.name, after.name), end="")
    if beyond := [why for c in changes if (why := c.excess(config.compare_plans.budget_bytes))]:
        raise KvpipeError("; ".join(beyond))
    return 0


def _common_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides common to both sides of a comparison."""
    own = ("compare_plans.", "experiment=")
    return [text for text in overrides if not text.lstrip("+~").startswith(own)]


def phases(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print the documentation of each phase, or of the requested one."""
    from kvpipe.pipeline.description import describe
    from kvpipe.report import phases as report

    asked = config.describe.phase
    found = [describe(name, config) for name in ([asked] if asked else phase_names())]
    match config.describe.format:
        case PlanFormat.json:
            print(json.dumps(report.as_json(found)))
        case PlanFormat.markdown:
            print(report.as_markdown(found), end="")
        case PlanFormat.table:
            from kvpipe.report.phases_table import print_phases

            print_phases(found, sys.stdout)
    return 0


def report(config: Kvpipe, plain: dict[str, Any], paths: Sequence[Path]) -> int:
    """Rewrite the report of a run or a sweep from its records.

    Raises:
        KvpipeError: there are no records, or the report cannot be written.
    """
    from kvpipe.report.run import read_run, records_file
    from kvpipe.sinks.report import write_page, write_timeline
    from kvpipe.sinks.sweep import write_sweep
    from kvpipe.sweeps.summary import summary_of

    if len(paths) != 1:
        raise InputError(
            f"report: name one directory of a run or a sweep, not {len(paths)}: report DIR"
        )
    (path,) = paths
    if is_sweep(path):
        print(*write_sweep(summary_of(path), _report_folder(config, path)), sep="\n")
        return 0
    found = read_run(path)
    folder = _report_folder(config, records_file(path).parent)
    print(write_page(found, folder), write_timeline(found, folder), sep="\n")
    return 0


def _report_folder(config: Kvpipe, own: Path) -> Path:
    """Return the directory of a report: the configured one, else ``own``.

    Raises:
        InputError: there is no such directory.
    """
    folder = Path(config.report.dir) if config.report.dir else own
    if not folder.is_dir():
        raise InputError(f"report.dir: there is no directory {folder}")
    return folder


def compare(config: Kvpipe, plain: dict[str, Any], paths: Sequence[Path]) -> int:
    """Print the differences between runs, comparing each further run with the first.

    Raises:
        KvpipeError: a side cannot be read, or a difference exceeds its threshold.
    """
    from kvpipe.report.comparison import Comparison
    from kvpipe.report.side import read_side

    # Each side is named by one letter.
    if not 2 <= len(paths) <= 26:
        raise InputError(
            f"compare: name 2 to 26 run directories, not {len(paths)}: compare RUN_A RUN_B"
        )
    comparison = Comparison.of([read_side(path) for path in paths])
    with _opened("compare.file", config.compare.file) as out:
        out.write(_compared(comparison, config.compare))
    if beyond := comparison.beyond(config.compare):
        raise KvpipeError("; ".join(beyond))
    return 0


def _compared(comparison: "Comparison", config: CompareConfig) -> str:
    from kvpipe.report import comparison_report

    match config.format:
        case CompareFormat.json:
            return json.dumps(comparison.to_json(config)) + "\n"
        case CompareFormat.markdown:
            return comparison_report.as_markdown(comparison, config)
        case CompareFormat.html:
            return comparison_report.comparison_page(comparison, config)


def doctor(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print the state of this machine; return 1 if the experiment could not run on it."""
    from kvpipe.parent import doctor
    from kvpipe.sinks.wandb import find_server

    steps = _checked_steps(config)
    could_run = True
    for finding in doctor.examine(config, plain, steps, find_server, (API_KEY,)):
        print(redactor(os.environ, None).text(str(finding)), flush=True)
        could_run &= finding.level is not doctor.Level.BAD
    print(f"{config.experiment} {'could' if could_run else 'could not'} run here")
    return HELD if could_run else CHECK_FAILED


_RUN = "run"
VERBS: dict[str, Callable[..., int]] = {
    _RUN: run,
    "check": check,
    "plan": plan,
    "compare-plans": compare_plans,
    "phases": phases,
    "report": report,
    "compare": compare,
    "doctor": doctor,
}
# The key that a bare word after the verb sets.
_WORD_AFTER = {"phases": "describe.phase"}
# Verbs that read paths, given before the overrides.
_TAKE_PATHS = ("report", "compare")


def _split_paths(verb: str, arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split the arguments into the paths that a verb reads and the arguments for Hydra."""
    if verb not in _TAKE_PATHS:
        return [], list(arguments)
    given = list(itertools.takewhile(_is_path, arguments))
    return [Path(text) for text in given], list(arguments[len(given) :])


def _is_path(argument: str) -> bool:
    """Whether an argument is a path, not a flag or override; a directory's name may contain '='."""
    return _is_word(argument) or ("=" in argument and Path(argument).exists())


def _split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb and the rest; a bare first word is the verb, by default ``run``.

    Raises:
        InputError: there is no such verb.
    """
    if not arguments or not _is_word(arguments[0]):
        return _RUN, list(arguments)
    verb, *rest = arguments
    if verb not in VERBS:
        raise InputError(f"there is no verb {verb!r}; {nearest(verb, VERBS)}")
    if verb in _WORD_AFTER and rest and _is_word(rest[0]):
        rest[0] = f'{_WORD_AFTER[verb]}="{rest[0]}"'
    return verb, rest


def _without_verb(line: str) -> str:
    """Return a partly typed command line without its verb, as Hydra's completion expects it."""
    program, _, typed = line.partition(" ")
    verb, space, rest = typed.lstrip().partition(" ")
    return f"{program} {rest}" if space and verb in VERBS else line


def _is_word(argument: str) -> bool:
    """Whether an argument is neither a flag nor an override."""
    return not argument.startswith(("-", "+", "~")) and "=" not in argument


@dataclass
class Task:
    """Callback for each config that Hydra composes: once, or once per job of a sweep.

    A launcher may call a copy of it in another process, so a sweep is summarised from records;
    ``codes`` covers this process only.

    Attributes:
        verb: the verb to run with the config.
        paths: paths for the verb, if it reads any.
        codes: the exit codes so far.
    """

    verb: str
    paths: Sequence[Path] = ()
    codes: list[int] = field(default_factory=list)

    def __call__(self, composed: DictConfig) -> int:
        """Run the verb with a config and return the exit code.

        Raises:
            SystemExit: a signal ended the run: Ctrl-C ends a sweep, not only its current job.
        """
        self.codes.append(0)
        # Hydra adds a line of its own to an exception from a job, so report the error here.
        code = self.codes[-1] = _told(lambda: self._act(composed))
        if code > SIGNALLED:
            sys.exit(code)
        return code

    def _act(self, composed: DictConfig) -> int:
        action = VERBS[self.verb]
        if self.verb in _TAKE_PATHS:
            action = partial(action, paths=self.paths)
        try:
            plain = to_plain(composed)
            if self.verb == _RUN:
                _refuse_secrets(plain)
            return action(from_plain(plain), plain)
        except (InputError, *COMPOSITION_ERRORS) as error:
            if self.verb == _RUN and _is_job():
                _record_refusal(error)
            raise


def _record_refusal(error: Exception) -> None:
    """Write the record of a sweep's job that was refused before anything started."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    told = _input_error(error)
    redact = redactor(os.environ, None)
    refused = RunFinished(
        status=FAILED,
        exit_code=told.exit_code,
        run_dir=str(run_dir),
        elapsed_s=0.0,
        error=redact.text(str(told)),
        command=redact.text(_command()),
    )
    with _records_file(run_dir) as records:
        records.run_finished(refused)


def _compose_and_act(arguments: Sequence[str]) -> int:
    """Let Hydra compose each config and run the verb with it; return the overall exit code."""
    verb, rest = _split_verb(arguments)
    paths, overrides = _split_paths(verb, rest)
    if _COMP_LINE in os.environ:
        os.environ[_COMP_LINE] = _without_verb(os.environ[_COMP_LINE])
    task = Task(verb, paths)
    NoteSweep.begun = None
    store_schema()
    with _run_dir(verb) as where:
        sys.argv = ["kvpipe", *overrides, *where]
        try:
            _let_hydra_call(task, overrides)
        except BaseException as error:
            sweep = _sweep_finished(verb)
            told = isinstance(error, (KvpipeError, *COMPOSITION_ERRORS))
            if sweep and sweep.exit_code and isinstance(error, Exception) and not told:
                # Raised by a launcher or a defect; the jobs and their records remain valid.
                _tell(traceback.format_exc())
                return sweep.exit_code
            raise
    sweep = _sweep_finished(verb)
    return sweep.exit_code if sweep else max(task.codes, default=HELD)


def _let_hydra_call(task: Task, overrides: Sequence[str]) -> None:
    try:
        with slurm.jobs(_tell):
            hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")(task)()
    except COMPOSITION_ERRORS:
        raise
    except (AssertionError, AttributeError, OSError, ValueError) as error:
        if task.codes:
            raise
        # Raised before the first job: a run directory that cannot be created, GROUP=3, a YAML file
        # that is not UTF-8, a key below a section that is null.
        message = uncaught(error, overrides)
        if message is None and not isinstance(error, OSError | ValueError):
            raise
        raise InputError(message or str(error)) from None


def _sweep_finished(verb: str) -> SweepFinished | None:
    """Write and show the summary of a sweep; None if there was no sweep, or no job started.

    Raises:
        KvpipeError: it cannot be written.
    """
    begun = NoteSweep.begun
    if verb != _RUN or begun is None or not is_sweep(begun.directory):
        return None
    if not (slurm.submitted() or any(job.begun for job in jobs_of(begun.directory))):
        return None
    from kvpipe.sinks.sweep import show_sweep, write_sweep
    from kvpipe.sweeps.summary import summary_of

    sweep = summary_of(begun.directory)
    write_sweep(sweep, begun.directory)
    show_sweep(sweep, _shown(begun.output))
    return sweep


@contextmanager
def _run_dir(verb: str) -> Iterator[list[str]]:
    """Yield overrides that keep Hydra's files out of the working directory, except for a run."""
    if verb == _RUN:
        yield []
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield [
            f'hydra.run.dir="{scratch}"',
            f'hydra.sweep.dir="{scratch}"',
            "hydra.output_subdir=null",
        ]


def _told(work: Callable[[], int]) -> int:
    """Return the exit code of ``work``, or of its error, which is printed if meant for people."""
    try:
        return work()
    except KvpipeError as error:
        told = error
    except COMPOSITION_ERRORS as error:
        told = _input_error(error)
    _tell("\n  ".join([f"kvpipe: {told}", *getattr(told, "__notes__", ())]) + "\n")
    return told.exit_code


def _input_error(error: Exception) -> InputError:
    """Convert an error of a wrong config to the error to report."""
    return error if isinstance(error, InputError) else InputError(one_message(error))


def _tell(text: str) -> None:
    """Write to stderr, with the environment's secrets redacted."""
    print(redactor(os.environ, None).text(text), end="", file=sys.stderr)
