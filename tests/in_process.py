"""Call the command line in this process, for what starts no engine: a process costs a second."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvpipe.cli import app
from kvpipe.parent import supervisor
from tests.helpers_config import compose_shipped_files_once


@dataclass(frozen=True)
class Answer:
    """An exit code, and the text written to stdout and stderr."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@contextmanager
def callable_in(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Yield a function that calls kvpipe in ``directory``; a run never begins.

    Undo what a call leaves in this process (``sys.argv``, the environment, logging).
    """

    def carry_out(self: supervisor.Run) -> None:
        raise AssertionError("a run was begun")

    compose_shipped_files_once(monkeypatch)
    monkeypatch.setattr(supervisor.Run, "carry_out", carry_out)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.chdir(directory)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        code = app.main(["kvpipe", *arguments])
        printed = capfd.readouterr()
        return Answer(code, printed.out, printed.err)

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


def files(directory: Path) -> list[str]:
    """Return what lies in a directory and below, relative to it."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
