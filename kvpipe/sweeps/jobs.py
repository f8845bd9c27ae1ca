"""The jobs of a sweep: the overrides of each, and the directory of its records.

Hydra writes the sweep's config into its directory before the first job begins. The jobs are read
from that config, not from the existing directories, so that a job that never began is noticed.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from kvpipe.config.hydra_secrets import Refused
from kvpipe.config.schema import OutputFormat
from kvpipe.errors import InputError
from kvpipe.system.lock import LOCK_FILE, InUse, Lock, cannot_write, not_locked
from kvpipe.system.places import CONF

SWEEP_CONFIG = "multirun.yaml"
HYDRA_DIR = ".hydra"
"""Directory of the composed config, in that of a run."""
_HYDRA_CONFIG = Path(HYDRA_DIR) / "hydra.yaml"
# The config group of predefined sweeps; choosing one makes every command a sweep.
_GROUP = "sweep"
_SWEEP_KEY = "hydra.sweep.dir"
# Hydra's name for the source that a program itself brings.
_MAIN = "main"


@dataclass(frozen=True)
class Begun:
    """The sweep that this process has started: its absolute directory, the format of stdout."""

    directory: Path
    output: OutputFormat


class NoteSweep(Callback):
    """Record the jobs that Hydra starts: the sweep, even if its launcher fails, or a run's directory.

    ``lock`` keeps other sweeps out of its directory; ``made`` are the directories that Hydra makes
    for a single run, the deepest first.
    """

    begun: ClassVar[Begun | None] = None
    lock: ClassVar[Lock | None] = None
    made: ClassVar[Sequence[Path]] = ()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record which directories Hydra is about to make."""
        directory = Path(config.hydra.run.dir).absolute()
        NoteSweep.made = [p for p in (directory, *directory.parents) if not p.exists()]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record the sweep, and own its directory.

        Raises:
            Refused: another sweep holds the directory, or an earlier one has left its jobs there.
        """
        directory = Path(config.hydra.sweep.dir).absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = Lock(directory / LOCK_FILE, _SWEEP_KEY)
            if not lock.acquire():
                print(not_locked(directory, "sweep"), file=sys.stderr)
            NoteSweep.lock = lock
        except InputError as refusal:
            raise Refused(refusal) from None
        except OSError as error:
            raise Refused(cannot_write(_SWEEP_KEY, directory, error)) from None
        if is_sweep(directory) and not (config.sweep.resume or config.runner.overwrite):
            message = (
                f"{_SWEEP_KEY}: {directory} has the jobs of an earlier sweep; choose another "
                "directory, or set sweep.resume=true to run only those that have not passed, or "
                "runner.overwrite=true to lose their records"
            )
            raise Refused(InUse(message))
        NoteSweep.begun = Begun(directory, config.output)


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its number from 0, its overrides, the command line that repeats it alone.

    Its directory has its records, if it has begun.
    """

    number: int
    overrides: Sequence[str]
    directory: Path
    command: str

    @property
    def values(self) -> dict[str, str]:
        """Key → value of each override; the key of an added group is its name."""
        pairs = (text.partition("=") for text in self.overrides)
        return {key.lstrip("+"): value for key, _, value in pairs}

    @property
    def begun(self) -> bool:
        """Whether Hydra has created its directory."""
        return self.directory.is_dir()


def is_sweep(path: Path) -> bool:
    """Whether a directory is a sweep's."""
    return (path / SWEEP_CONFIG).is_file()


def jobs_of(sweep_dir: Path) -> tuple[Job, ...]:
    """Return all jobs of a sweep, in order, including those that have not begun."""
    hydra = OmegaConf.load(sweep_dir / SWEEP_CONFIG).hydra
    params = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    given = _parser(hydra).parse_overrides([*params, *hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(given, max_batch_size=None)
    directories = _directories(sweep_dir)
    return tuple(
        Job(
            number,
            overrides,
            directories.get(number, sweep_dir / str(number)),
            command_line(hydra, overrides),
        )
        for number, overrides in enumerate(jobs)
    )


def command_line(hydra: HydraConf | DictConfig, overrides: Sequence[str]) -> str:
    """Return the command line of a single run with these overrides.

    ``hydra`` is Hydra's own part of the config, of the run or of its sweep.
    """
    directory = config_dir(hydra.runtime.config_sources)
    flags = ["--config-dir", directory] if directory else []
    # A predefined sweep, once chosen, would make this run a sweep too.
    mode = ["hydra.mode=RUN"] if hydra.runtime.choices.get(_GROUP) else []
    return shlex.join(["python", "-m", "kvpipe", *flags, *mode, *overrides])


def config_dir(sources: Sequence[Any]) -> str | None:
    """Return the directory given by ``--config-dir``, from ``hydra.runtime.config_sources``."""
    return next((s.path for s in sources if s.provider == "command-line"), None)


def _parser(hydra: DictConfig) -> OverridesParser:
    """Return the parser of the sweep's overrides; glob(*) expands to the available choices."""
    Plugins.instance()  # registers the kinds of config sources
    path = ConfigSearchPathImpl()
    for source in hydra.runtime.config_sources:
        # The configs that ship with kvpipe may lie elsewhere now, on another machine for example.
        own = source.provider == _MAIN
        path.append(source.provider, str(CONF) if own else f"{source.schema}://{source.path}")
    return OverridesParser.create(ConfigLoaderImpl(path))


def _directories(sweep_dir: Path) -> Mapping[int, Path]:
    """Return number → directory of the jobs that have begun, for any ``sweep.subdir``."""
    found = {}
    for path in sorted(sweep_dir.rglob(str(_HYDRA_CONFIG))):
        job = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["job"]
        found[job["num"]] = path.parent.parent
    return found
