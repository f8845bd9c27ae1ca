"""Planted faults as files: exact texts to replace in the product, and the tests or run that must notice it.

A fault names texts and no line numbers, so that it survives changes around it. A text that no longer
occurs exactly once is an error: otherwise the fault would silently no longer be tested.
"""

import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BrokenFault(Exception):
    """A fault's file is wrong, or its edits no longer apply."""


@dataclass(frozen=True)
class Edit:
    """A text in a file and its replacement.

    Attributes:
        file: path from the root of the repository.
        old: text that occurs exactly once in it.
        new: text in its place.
    """

    file: str
    old: str
    new: str

    def applied(self, tree: Path) -> str:
        """Return the content of the file in a copy of the repository, edited.

        Raises:
            BrokenFault: the file is missing, the text does not occur exactly once, or the result
                is not Python.
        """
        path = tree / self.file
        if not path.is_file():
            raise BrokenFault(f"{self.file} does not exist")
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise BrokenFault(f"{self.file} has the old text {count} times, not once")
        if self.old == self.new:
            raise BrokenFault(f"{self.file}: old and new text are the same")
        edited = text.replace(self.old, self.new)
        if path.suffix == ".py":
            _check_syntax(self.file, edited)
        return edited

    def apply(self, tree: Path) -> None:
        """Edit the file in a copy of the repository."""
        path, edited = tree / self.file, self.applied(tree)
        path.unlink()  # other copies have the same file
        path.write_text(edited, encoding="utf-8")
        # Bytecode counts as valid by whole seconds and size; an edit may change neither.
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        name: name of its file, without the suffix.
        title: the effect on a user.
        edits: the edits that plant it.
        tests: pytest arguments of the tests that must notice it.
        run: arguments of a run that should notice it by its own checks; empty if no run can.
        no_run: why no run can notice it; empty if one should.
        hole: why that run passes nevertheless, and the issue that will close the hole; empty if it
            fails.
    """

    name: str
    title: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...] = ()
    run: str = ""
    no_run: str = ""
    hole: str = ""

    def __post_init__(self) -> None:
        if not self.title or not self.edits:
            raise BrokenFault("title and at least one [[edits]] are needed")
        if self.run and self.no_run:
            raise BrokenFault("'no_run' says why no run can notice it, but a 'run' is given")
        if self.hole and not self.run:
            raise BrokenFault("'hole' says why the run passes, but no 'run' is given")
        if not self.tests and (not self.run or self.hole):
            raise BrokenFault(
                "no test and no run must notice it: give 'tests', or a 'run' without 'hole'"
            )

    def check(self, tree: Path) -> None:
        """Raise BrokenFault if an edit does not apply to a copy of the repository."""
        for edit in self.edits:
            edit.applied(tree)

    def plant(self, tree: Path) -> None:
        """Apply all edits to a copy of the repository."""
        for edit in self.edits:
            edit.apply(tree)


def read_fault(path: Path) -> Fault:
    """Return the fault of a file.

    Raises:
        BrokenFault: the file is not TOML, or has wrong keys or values.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        edits = tuple(Edit(**edit) for edit in content.pop("edits", ()))
        tests = tuple(content.pop("tests", ()))
        return Fault(name=path.stem, edits=edits, tests=tests, **content)
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise BrokenFault(str(error)) from error


def _check_syntax(file: str, source: str) -> None:
    try:
        compile(source, file, "exec")
    except SyntaxError as error:
        raise BrokenFault(f"{file} is no Python after the edit: {error}") from error
