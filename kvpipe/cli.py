"""The command line: a verb, then Hydra overrides. The composition root; no phase names here.

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

from kvpipe import slurm
from kvpipe.credentials import API_KEY, redactor, refuse_secrets, wandb_api_key
from kvpipe.errors import CHECK_FAILED, DEFECT, HELD, SIGNALLED, InputError, KvpipeError
from kvpipe.hosts import check_hosts, is_first, node_rank, own_file
from kvpipe.hydra_errors import COMPOSITION_ERRORS, one_message, uncaught
from kvpipe.hydra_store import store_schema
from kvpipe.jax_environment import check_mesh, jax_environment
from kvpipe.model_dir import check_model, check_shape
from kvpipe.phase import Phase
from kvpipe.plan import check_order, misfit
from kvpipe.planning import Planners
from kvpipe.prompt import read_prompt
from kvpipe.records import FAILED, RECORDS_FILE, RunFinished, RunStarted, SweepFinished
from kvpipe.report.plan import as_json, as_markdown
from kvpipe.schema import (
    CompareConfig,
    CompareFormat,
    Kvpipe,
    OutputFormat,
    PlanFormat,
    TrackingMode,
    from_plain,
    to_plain,
)
from kvpipe.sinks import Sink, Sinks
from kvpipe.sinks.heartbeat import Heartbeat
from kvpipe.sinks.jsonl import JsonFile, JsonLines
from kvpipe.steps import build_steps, phase_names
from kvpipe.suggest import nearest
from kvpipe.sweeps.group import grouped
from kvpipe.sweeps.jobs import SWEEP_CONFIG, NoteSweep, command_line, config_dir, is_sweep, jobs_of
from kvpipe.targets import find_target
from kvpipe.versions import installed_versions

if TYPE_CHECKING:
    from kvpipe.report.comparison import Comparison

# Where a shell puts the line that is to be completed.
_COMP_LINE = "COMP_LINE"
_PLANNERS = Planners(secrets=(API_KEY,))


def main(argv: Sequence[str]) -> int:
    """Run the verb of a command line and return the exit code.

    Args:
        argv: the program's name, then the verb if there is one, then Hydra's arguments.

    Raises:
        SystemExit: help was asked for, a flag is unknown, or a signal ended a job of a sweep.
    """
    # Hydra would print its own message and exit 1; its errors are told here, like all others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with _PLANNERS:
        try:
            return _told(lambda: _compose_and_act(argv[1:]))
        except Exception:
            # What is no person's mistake at the terminal must not look like one.
            _tell(traceback.format_exc())
            return DEFECT


def run(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Carry the run out; everything that can be wrong with the input is refused before it."""
    from kvpipe import supervisor
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
    """Yield what takes the records: on the first host all sinks, on another what a failure leaves.

    Raises:
        InputError: the file of the records cannot be made.
    """
    from kvpipe.sinks.failed_records import FailedRecords
    from kvpipe.sinks.report import ReportPage, TimelinePicture

    if not is_first(config.engine):
        yield FailedRecords(run_dir / own_file(RECORDS_FILE, config.engine), sys.stderr)
        return
    with _records_file(run_dir) as records:
        # W&B first: what it cannot take at the end has to stand in the other sinks' last record.
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
    """Refuse a job over several hosts: those after the first have no records to tell a sweep from.

    Raises:
        InputError: it is one.
    """
    if config.engine.nnodes > 1:
        raise InputError(
            f"engine.nnodes is {config.engine.nnodes}, but a sweep's jobs run on one host each; "
            "type a run for each size on the hosts instead"
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
    """Let a finished run stand for this job of a sweep, if there is one; say so."""
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
    """Refuse a config that holds a secret; Hydra has written it down by now, so that goes.

    Raises:
        InputError: it does.
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
    """Return the file of the records.

    Raises:
        InputError: it cannot be made.
    """
    try:
        return JsonFile(run_dir / RECORDS_FILE)
    except OSError as error:
        raise InputError(f"hydra.run.dir: cannot write in {run_dir}: {error.strerror}") from None


def _command() -> str:
    """Return the command line that does this run, or this job of a sweep, again."""
    hydra_config = HydraConfig.get()
    return command_line(hydra_config, hydra_config.overrides.task)


def _api_key(plain: dict[str, Any]) -> str | None:
    """Return the W&B API key; the ``.env`` of this directory is read only where it is needed."""
    if plain["tracking"]["mode"] == TrackingMode.online.value:
        return wandb_api_key(Path(HydraConfig.get().runtime.cwd), os.environ)
    return os.environ.get(API_KEY)


def _screen(output: OutputFormat) -> Sink:
    """Return what shows the run on stdout: a table for people, JSON lines for pipes."""
    if _shown(output) is OutputFormat.json:
        return JsonLines(sys.stdout)
    from kvpipe.sinks.console import ConsoleTable

    return ConsoleTable()


def _shown(output: OutputFormat) -> OutputFormat:
    """Return what stdout shows."""
    if output is not OutputFormat.auto:
        return output
    return OutputFormat.table if sys.stdout.isatty() else OutputFormat.json


def _heartbeat(config: Kvpipe) -> list[Sink]:
    """Return what writes a line to stderr now and then, unless a terminal shows the run live."""
    live = config.output is not OutputFormat.json and sys.stdout.isatty()
    if live or config.runner.heartbeat_s is None:
        return []
    return [Heartbeat(sys.stderr, config.runner.heartbeat_s)]


def _checked_steps(config: Kvpipe) -> tuple[Phase, ...]:
    """Return the steps after every check of the input that needs no jax."""
    steps = build_steps(config)
    check_order(steps)
    check_mesh(config.engine)
    check_hosts(config)
    check_model(config)
    read_prompt(config.prompt)
    return steps


def check(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Fold what the steps declare and say that their order holds."""
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
    """Yield ``file``, the value of ``key``, to write in, or stdout without one."""
    if file is None:
        yield sys.stdout
        return
    try:
        with Path(file).open("w", encoding="utf-8") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"{key}: cannot write {file}: {error.strerror}") from None


def compare_plans(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print what a change of files or overrides costs, experiment by experiment.

    Raises:
        KvpipeError: it costs more than the budget.
    """
    from kvpipe import revisions
    from kvpipe.report import plan_changes

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
    print(plan_changes.as_markdown(changes, before.name, after.name), end="")
    if beyond := [why for c in changes if (why := c.excess(config.compare_plans.budget_bytes))]:
        raise KvpipeError("; ".join(beyond))
    return 0


def _common_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that both sides of a comparison have."""
    own = ("compare_plans.", "experiment=")
    return [text for text in overrides if not text.lstrip("+~").startswith(own)]


def phases(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print what each phase, or the one that is asked for, does, takes and needs."""
    from kvpipe.phase_docs import describe
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
    """Write the report of a run or of a sweep again, from the records.

    Raises:
        KvpipeError: there are no records, or it cannot be written.
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
    """Return where a report goes, ``own`` if the config names no directory.

    Raises:
        InputError: there is no such directory.
    """
    folder = Path(config.report.dir) if config.report.dir else own
    if not folder.is_dir():
        raise InputError(f"report.dir: there is no directory {folder}")
    return folder


def compare(config: Kvpipe, plain: dict[str, Any], paths: Sequence[Path]) -> int:
    """Print what differs between runs, each further one held against the first.

    Raises:
        KvpipeError: a side cannot be read, or what differs is beyond the thresholds.
    """
    from kvpipe.report.comparison import Comparison
    from kvpipe.report.side import read_side

    # Each side has a letter of its own.
    if not 2 <= len(paths) <= 26:
        raise InputError(
            f"compare: name 2 to 26 run directories, not {len(paths)}: compare RUN_A RUN_B"
        )
    comparison = Comparison([read_side(path) for path in paths])
    with _opened("compare.file", config.compare.file) as out:
        out.write(_compared(comparison, config.compare))
    if beyond := comparison.beyond(config.compare):
        raise KvpipeError("; ".join(beyond))
    return 0


def _compared(comparison: "Comparison", config: CompareConfig) -> str:
    match config.format:
        case CompareFormat.json:
            return json.dumps(comparison.to_json(config)) + "\n"
        case CompareFormat.markdown:
            from kvpipe.report import comparison_markdown

            return comparison_markdown.as_markdown(comparison, config)
        case CompareFormat.html:
            from kvpipe.report.comparison_page import comparison_page

            return comparison_page(comparison, config)


def doctor(config: Kvpipe, plain: dict[str, Any]) -> int:
    """Print what this machine has, and return 1 if the experiment could not run on it."""
    from kvpipe import doctor
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
# What a word after the verb is short for.
_WORD_AFTER = {"phases": "describe.phase"}
# What these read is named by paths, which stand before the overrides.
_TAKE_PATHS = ("report", "compare")


def _split_paths(verb: str, arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the paths that a verb reads, and the arguments that are Hydra's."""
    if verb not in _TAKE_PATHS:
        return [], list(arguments)
    given = list(itertools.takewhile(_is_path, arguments))
    return [Path(text) for text in given], list(arguments[len(given) :])


def _is_path(argument: str) -> bool:
    """Return whether an argument is no flag and no override; a directory's name may have a '='."""
    return _is_word(argument) or ("=" in argument and Path(argument).exists())


def _split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb and the rest; a bare first word is a verb, none means run.

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
    """Return a command line that is being typed as Hydra's completion can read it."""
    program, _, typed = line.partition(" ")
    verb, space, rest = typed.lstrip().partition(" ")
    return f"{program} {rest}" if space and verb in VERBS else line


def _is_word(argument: str) -> bool:
    """Return whether an argument is neither a flag nor an override."""
    return not argument.startswith(("-", "+", "~")) and "=" not in argument


@dataclass
class Task:
    """What Hydra calls with each config that it has composed: once, or once for a job of a sweep.

    A launcher may call a copy of it in another process, so a sweep's end is read from records;
    ``codes`` has only what happened here.

    Attributes:
        verb: what is done with the config.
        paths: what the verb reads, if it is one of those that take paths.
        codes: the exit codes so far.
    """

    verb: str
    paths: Sequence[Path] = ()
    codes: list[int] = field(default_factory=list)

    def __call__(self, composed: DictConfig) -> int:
        """Act on a config and return the exit code.

        Raises:
            SystemExit: a signal ended the run: Ctrl-C ends a sweep, not only its current job.
        """
        self.codes.append(0)
        # Hydra adds a line of its own to what a job raises, so a job tells its errors itself.
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
    """Leave the record of a job of a sweep that was refused before anything was started."""
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
    """Let Hydra compose each config and act on it; return the exit code of all of it."""
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
                # What a launcher, or a defect, has thrown; the jobs and their records stand.
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
        # Before the first job: a run directory that cannot be made, GROUP=3, a YAML file that
        # is not UTF-8, a key below a section that is null.
        message = uncaught(error, overrides)
        if message is None and not isinstance(error, OSError | ValueError):
            raise
        raise InputError(message or str(error)) from None


def _sweep_finished(verb: str) -> SweepFinished | None:
    """Write and show what a sweep has found; None if there was none, or no job got so far.

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
    """Yield the overrides that send Hydra's own files where they leave no trace, but for a run."""
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
    """Do ``work`` and return its exit code; an error meant for people is told and gives its own."""
    try:
        return work()
    except KvpipeError as error:
        told = error
    except COMPOSITION_ERRORS as error:
        told = _input_error(error)
    _tell("\n  ".join([f"kvpipe: {told}", *getattr(told, "__notes__", ())]) + "\n")
    return told.exit_code


def _input_error(error: Exception) -> InputError:
    """Return what is told of a config that is wrong."""
    return error if isinstance(error, InputError) else InputError(one_message(error))


def _tell(text: str) -> None:
    """Write to stderr, without the secrets of the environment."""
    print(redactor(os.environ, None).text(text), end="", file=sys.stderr)
