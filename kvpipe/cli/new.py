"""``kvpipe new phase NAME``: write a phase and its test, to begin with."""

import keyword
from collections.abc import Sequence
from pathlib import Path
from string import Template

from omegaconf import DictConfig

from kvpipe.config.schema import from_plain, to_plain
from kvpipe.errors import HELD, InputError
from kvpipe.pipeline.phase_files import phase_names
from kvpipe.records.run import RUN_RECORDS
from kvpipe.system import places

_TEMPLATES = Path(__file__).parent / "templates"
_PHASE = "phase"
# Where a new phase is written if ``phase_path`` says nothing.
_FOLDER = "phases"


def act(composed: DictConfig, words: Sequence[Path]) -> int:
    """Write a phase into the first directory of ``phase_path``, its test beside that directory.

    Raises:
        InputError: the name cannot be that of a new phase, or a file cannot be written.
    """
    config = from_plain(to_plain(composed))
    if len(words) != 2 or str(words[0]) != _PHASE:
        given = " ".join(map(str, words))
        raise InputError(f"new: give a kind and a name, not {given!r}: new {_PHASE} NAME")
    name, folder = str(words[1]), Path(next(iter(config.phase_path), _FOLDER))
    _refuse_name(name, [path for path in config.phase_path if Path(path).is_dir()])
    files = file, test = folder / f"{name}.py", folder.parent / "tests" / f"test_{name}.py"
    values = {"name": name, "cls": name.title().replace("_", ""), "folder": folder.name}
    for path in files:
        if path.exists():
            raise InputError(f"new phase: there is {path} already; choose another name")
    for path, template in zip(files, ("phase.txt", "phase_test.txt"), strict=True):
        _write(path, Template((_TEMPLATES / template).read_text("utf-8")).substitute(values))
    print(f"{file}\n{test}\n{_what_next(name, folder)}")
    return HELD


def _refuse_name(name: str, path: Sequence[str]) -> None:
    valid = name.isascii() and name.isidentifier() and name.islower() and name[0] != "_"
    if not valid or keyword.iskeyword(name):
        raise InputError(
            f"new phase: {name!r} is not a valid name; write lower-case letters, digits and '_', a letter first"
        )
    if name in RUN_RECORDS or name in phase_names(path):
        raise InputError(f"new phase: there is {name!r} already; choose another name")


def _what_next(name: str, folder: Path) -> str:
    """Return the lines of YAML that use the phase, and a command that does without."""
    shipped = folder.resolve() == places.PHASES.resolve()
    path = "" if shipped else f"phase_path: [{folder}]\n"
    given = "" if shipped else f" 'phase_path=[{folder}]'"
    return (
        f"\n# Into a pipeline's file:\n{path}pipeline:\n  - {name}\n"
        f"\n# Or without one:\n"
        f"python -m kvpipe check{given} pipeline_edit.after.kv_cache_rebuilt={name}"
    )


def _write(path: Path, text: str) -> None:
    """Write a new file.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"new phase: cannot write {path}: {error.strerror}") from None
