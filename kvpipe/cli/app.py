"""The command line: a verb, then Hydra overrides. The composition root; it must not name phases.

Exit codes: :data:`kvpipe.errors.EXIT_CODES`.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from kvpipe.cli.common import PLANNERS, input_error, notify, shown_format
from kvpipe.cli.verbs import RUN, VERBS, split_paths, split_verb, without_verb
from kvpipe.config.hydra_errors import COMPOSITION_ERRORS, uncaught
from kvpipe.config.hydra_secrets import Refused
from kvpipe.config.hydra_store import store_schema
from kvpipe.errors import DEFECT, HELD, SIGNALLED, InputError, KvpipeError
from kvpipe.records.sweep import SweepFinished
from kvpipe.sweeps import slurm
from kvpipe.sweeps.jobs import NoteSweep, is_sweep, jobs_of
from kvpipe.system.places import CONF

# Variable in which a shell passes the line to complete.
_COMP_LINE = "COMP_LINE"


def main(argv: Sequence[str]) -> int:
    """Run the verb of a command line, after the program's name, and return the exit code.

    Raises:
        SystemExit: help was asked for, a flag is unknown, or a signal ended a job of a sweep.
        KeyboardInterrupt: Ctrl-C came, and no run had begun.
    """
    # Hydra would print its own message and exit 1; its errors are reported here, like all others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with PLANNERS:
        try:
            return _exit_code(lambda: _all_written(argv[1:]))
        except Exception:
            # A defect must not look like a mistake of the person at the terminal: print the
            # traceback.
            notify(traceback.format_exc())
            return DEFECT


@dataclass
class Task:
    """Callback for each config that Hydra composes: for a run once, for a sweep once per job.

    A launcher may call a copy of it in another process, so a sweep is summarised from records;
    ``codes`` covers this process only.
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
        work = partial(VERBS[self.verb].act, composed, self.paths)
        code = self.codes[-1] = _exit_code(work)
        if code > SIGNALLED:
            sys.exit(code)
        return code


def _all_written(arguments: Sequence[str]) -> int:
    """Act, then flush stdout: a disk that is full must not end in a code of success."""
    try:
        code = _compose_and_act(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    if code == HELD:
        sys.stdout.flush()
    return code


def _compose_and_act(arguments: Sequence[str]) -> int:
    """Let Hydra compose each config and run the verb with it; return the overall exit code."""
    verb, rest = split_verb(arguments)
    paths, overrides = split_paths(verb, rest)
    if _COMP_LINE in os.environ:
        os.environ[_COMP_LINE] = without_verb(os.environ[_COMP_LINE])
    task = Task(verb, paths)
    NoteSweep.begun = NoteSweep.lock = None
    NoteSweep.made = ()
    store_schema()
    with _run_dir(verb) as where:
        sys.argv = ["kvpipe", *overrides, *where]
        try:
            _call_hydra(task, overrides)
        except BaseException as error:
            sweep = _sweep_finished(verb)
            reported = isinstance(error, (KvpipeError, *COMPOSITION_ERRORS))
            if sweep and sweep.exit_code and isinstance(error, Exception) and not reported:
                # Raised by a launcher or a defect; the jobs and their records remain valid.
                notify(traceback.format_exc())
                return sweep.exit_code
            raise
        finally:
            if NoteSweep.lock:
                NoteSweep.lock.release()
    sweep = _sweep_finished(verb)
    return sweep.exit_code if sweep else max(task.codes, default=HELD)


def _call_hydra(task: Task, overrides: Sequence[str]) -> None:
    try:
        with slurm.jobs(notify):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except COMPOSITION_ERRORS:
        raise
    except Refused as refused:
        raise refused.error from None
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
    """Write and show the summary of a sweep; None if there was no sweep, or no job started."""
    begun = NoteSweep.begun
    if verb != RUN or begun is None or not is_sweep(begun.directory):
        return None
    if not (slurm.submitted() or any(job.begun for job in jobs_of(begun.directory))):
        return None
    from kvpipe.sinks.sweep import show_sweep, write_sweep
    from kvpipe.sweeps.summary import summary_of

    sweep = summary_of(begun.directory)
    write_sweep(sweep, begun.directory)
    show_sweep(sweep, shown_format(begun.output))
    return sweep


@contextmanager
def _run_dir(verb: str) -> Iterator[list[str]]:
    """Yield overrides that keep Hydra's files out of the working directory, except for a run."""
    if verb == RUN:
        yield []
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield [
            f'hydra.run.dir="{scratch}"',
            f'hydra.sweep.dir="{scratch}"',
        ]


def _exit_code(work: Callable[[], int]) -> int:
    """Return the exit code of ``work``, or of its error, which is printed if meant for people."""
    try:
        return work()
    except KvpipeError as error:
        caught = error
    except COMPOSITION_ERRORS as error:
        caught = input_error(error)
    notify("\n  ".join([f"kvpipe: {caught}", *getattr(caught, "__notes__", ())]) + "\n")
    return caught.exit_code
