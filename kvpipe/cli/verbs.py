"""The map from verb to file, and how a command line is split into verb, paths and overrides."""

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from kvpipe.errors import InputError
from kvpipe.suggest import nearest

RUN = "run"


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        module: module whose ``act`` executes the verb with a composed config and returns the exit
            code; imported only for a command of this verb.
        takes_paths: whether paths may follow the verb; they are the second argument of ``act``.
        word_sets: key of the config that a bare word after the verb sets.
    """

    module: str
    takes_paths: bool = False
    word_sets: str | None = None

    def act(self, composed: DictConfig, paths: Sequence[Path]) -> int:
        """Import the verb's module and execute the verb; return the exit code."""
        act = importlib.import_module(self.module).act
        return act(composed, paths) if self.takes_paths else act(composed)


VERBS = {
    RUN: Verb("kvpipe.cli.run"),
    "check": Verb("kvpipe.cli.check"),
    "plan": Verb("kvpipe.cli.plan"),
    "compare-plans": Verb("kvpipe.cli.compare_plans"),
    "phases": Verb("kvpipe.cli.phases", word_sets="describe.phase"),
    "new": Verb("kvpipe.cli.new", takes_paths=True),
    "report": Verb("kvpipe.cli.report", takes_paths=True),
    "compare": Verb("kvpipe.cli.compare", takes_paths=True),
    "doctor": Verb("kvpipe.cli.doctor"),
}


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb and the rest; a bare first word is the verb, by default ``run``.

    Raises:
        InputError: there is no such verb.
    """
    if not arguments or not _is_word(arguments[0]):
        return RUN, list(arguments)
    verb, *rest = arguments
    if verb not in VERBS:
        raise InputError(f"there is no verb {verb!r}; {nearest(verb, VERBS)}")
    if (key := VERBS[verb].word_sets) and rest and _is_word(rest[0]):
        rest[0] = f'{key}="{rest[0]}"'
    return verb, rest


def split_paths(verb: str, arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split the arguments into the paths that a verb reads and the arguments for Hydra."""
    if not VERBS[verb].takes_paths:
        return [], list(arguments)
    given = list(itertools.takewhile(_is_path, arguments))
    return [Path(text) for text in given], list(arguments[len(given) :])


def without_verb(line: str) -> str:
    """Return a partly typed command line without its verb, as Hydra's completion expects it."""
    program, _, typed = line.partition(" ")
    verb, space, rest = typed.lstrip().partition(" ")
    return f"{program} {rest}" if space and verb in VERBS else line


def _is_path(argument: str) -> bool:
    """Whether an argument is a path, not a flag or override; a directory's name may contain '='."""
    return _is_word(argument) or ("=" in argument and Path(argument).exists())


def _is_word(argument: str) -> bool:
    """Whether an argument is neither a flag nor an override."""
    return not argument.startswith(("-", "+", "~")) and "=" not in argument
