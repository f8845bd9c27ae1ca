"""Complete and check the config of a run that saves its trainer, or that resumes one, before it starts.

Everything here is read from JSON: nothing is loaded, and a wrong checkpoint is refused at once.
"""

import secrets
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpipe.checkpoints import resumable
from kvpipe.config.schema import Kvpipe, TrackingMode, from_plain
from kvpipe.config.training_inputs import as_plain, digests
from kvpipe.errors import InputError
from kvpipe.plan.continuation import skipped_names
from kvpipe.plan.fold import PlannedStep
from kvpipe.records.run import PASSED, RECORDS_FILE, Record
from kvpipe.report.config_changes import KeyChange, config_changes
from kvpipe.report.run import read_records, run_of
from kvpipe.system.lock import InUse
from kvpipe.system.versions import installed_versions
from kvpipe.units import counted

# Sections and keys that no weight and no loss depends on.
_FREE = (
    "cache_dir",
    "compare",
    "compare_plans",
    "describe",
    "engine.dist_init_addr",
    "engine.download_dir",
    "engine.log_level",
    "engine.node_rank",
    "engine.precompile",
    "engine.watchdog_timeout",
    "engine.weight_digests",
    "experiment",
    "label",
    "output",
    "phase_path",
    "plan",
    "repeat.times",
    "report",
    "runner",
    "sinks",
    "sweep",
    "tracking",
    "trainer.checkpoint_dir",
    "trainer.checkpoint_every",
)
# Those that every resumed run has otherwise; the edits of a pipeline are in the pipeline.
_OF_EVERY_RESUME = ("pipeline_edit", "resume", "resume_after", "tracking.id")
_ID_CHARS = string.ascii_lowercase + string.digits
_SHA_CHARS = 12


def completed(plain: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the config with the checkpoints' directory and, with ``resume``, the checkpoint's values.

    Raises:
        InputError: there is nothing to resume, or the checkpoint is not of this config.
    """
    if plain["resume_after"] is not None:
        raise InputError("resume_after: resume=true sets it; leave it out")
    trainer, tracking = plain["trainer"], plain["tracking"]
    if not (trainer["checkpoint_every"] or plain["resume"]):
        return plain
    directory = Path(trainer["checkpoint_dir"] or run_dir / resumable.CHECKPOINTS_DIR).absolute()
    plain = plain | {"trainer": trainer | {"checkpoint_dir": str(directory)}}
    if plain["resume"]:
        path = _to_resume(run_dir, directory)
        about = resumable.read(path)
        _refuse_other(from_plain(plain), path, about)
        kept_id = tracking["id"] or about.tracking_id
        plain |= {"resume_after": about.cycle, "tracking": tracking | {"id": kept_id}}
    if plain["tracking"]["mode"] != TrackingMode.disabled.value and not plain["tracking"]["id"]:
        new_id = "".join(secrets.choice(_ID_CHARS) for _ in range(8))
        plain |= {"tracking": tracking | {"id": new_id}}
    return plain


def messages(config: Kvpipe, planned: Sequence[PlannedStep]) -> Iterator[str]:
    """Yield the messages for the user of a resumed run; none for any other run."""
    if config.resume_after is None:
        return
    steps = [item.step for item in planned]
    path = _path(config)
    about = resumable.read(path)
    skipped = skipped_names(config, steps)
    yield (
        f"resumes after cycle {config.resume_after}, from {path}: {counted(len(skipped), 'step')} of "
        f"the cycles before are skipped ({skipped[0]} … {skipped[-1]})"
    )
    if free := [change for change in _changes(config, about) if _is_free(change.key)]:
        yield f"no weight or loss depends on what differs from then: {_in_words(free)}"
    versions = {key: value for key, value in installed_versions().items() if key in about.versions}
    if changed := config_changes(about.versions, versions):
        yield f"versions differ from then, so bits may too: {_in_words(changed)}"


def begin_anew(config: Kvpipe, overwrite: bool) -> None:
    """Make way for the checkpoints of a run, unless it resumes another.

    Raises:
        InUse: those of an earlier run are there, and ``overwrite`` is false.
    """
    directory = config.trainer.checkpoint_dir
    if config.resume or directory is None:
        return
    if (found := resumable.last(Path(directory))) is not None and not overwrite:
        raise InUse(
            f"trainer.checkpoint_dir: {found} is of an earlier run; resume=true continues that run, "
            "runner.overwrite=true loses it"
        )
    resumable.remove(Path(directory))


def earlier_records(run_dir: Path) -> list[Record]:
    """Return the records of a run directory; none if it has no such file."""
    file = run_dir / RECORDS_FILE
    return read_records(file) if file.is_file() else []


def _to_resume(run_dir: Path, directory: Path) -> Path:
    """Return the checkpoint to resume from.

    Raises:
        InputError: there is none, or the run has finished.
    """
    if run_of("", earlier_records(run_dir)).status == PASSED:
        raise InputError(f"resume: the run in {run_dir} has finished; there is nothing to resume")
    if (path := resumable.last(directory)) is None:
        raise InputError(
            f"resume: there is no checkpoint in {directory}; name the run's directory with "
            "hydra.run.dir, or leave resume out to start from the beginning"
        )
    return path


def _refuse_other(config: Kvpipe, path: Path, about: resumable.About) -> None:
    """Refuse a config with which the training would be another one than the checkpoint's."""
    if wrong := [change for change in _changes(config, about) if not _is_free(change.key)]:
        raise InputError(
            f"resume: the training of {path} was another one: {_in_words(wrong)}; set it back, or "
            "start a new run"
        )
    for key, now in digests(config).items():
        if (then := about.files.get(key)) != now:
            raise InputError(
                f"resume: {key} is not what it was for {path}: its SHA-256 is {_short(now)}, it was "
                f"{_short(then)}"
            )


def _path(config: Kvpipe) -> Path:
    assert config.trainer.checkpoint_dir is not None and config.resume_after is not None
    return resumable.path_of(Path(config.trainer.checkpoint_dir), config.resume_after)


def _changes(config: Kvpipe, about: resumable.About) -> list[KeyChange]:
    return [
        change
        for change in config_changes(about.config, as_plain(config))
        if change.key not in _OF_EVERY_RESUME and not change.key.startswith("pipeline_edit.")
    ]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _in_words(changes: list[KeyChange]) -> str:
    return "; ".join(
        f"{change.key} is {', '.join(change.after) or 'not set'}, it was "
        f"{', '.join(change.before) or 'not set'}"
        for change in changes
    )


def _short(digest: str | None) -> str:
    return digest[:_SHA_CHARS] if digest else "none"
