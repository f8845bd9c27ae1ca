"""Turn the long messages of Hydra and OmegaConf into one line in the config's own terms."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError, YAMLError

from kvpipe.config.schema import Kvpipe
from kvpipe.suggest import nearest

# Raised while composing a config when the config or the command line is wrong.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)

_FILE = re.compile(r"(In '(.+?)/.+'): \w+ raised while composing config")
_NO_MERGE = "Cannot merge DictConfig with ListConfig"
_NO_LIST = "is not a ListConfig, list or tuple"
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*)'$", re.MULTILINE)
_NOT_CHOSEN = re.compile(
    r"Could not override '(.+)'\. No match in the defaults list\.\s"
    r"To append to your default list use (.+)"
)
_FORCED = re.compile(r"force-add of config groups is not supported: '\+\+(.+?)=(.*)'")
_IN_PACKAGE = re.compile(r"(In '.+'): Could not override '\w+@")
# Groups whose files set keys of the whole config.
_GLOBAL = ("experiment", "pipeline", "sweep")
_HEADER = (
    "the file must begin with '# @package _global_', without a byte order mark (BOM) before it"
)
# Config files of packages that only an extra of kvpipe installs.
_OF_EXTRAS = {"hydra/launcher/submitit_slurm": "slurm", "hydra/launcher/submitit_local": "slurm"}


def one_message(error: Exception) -> str:
    """Return the message of one of :data:`COMPOSITION_ERRORS` as one line.

    It names the key or the argument, the fault, and a valid alternative.
    """
    if isinstance(error, MissingConfigException):
        return _no_such_file(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML: {error.problem}"
    # Hydra chains some errors to OmegaConf's with "from", others by raising in the handler.
    value_error = error if isinstance(error, OmegaConfBaseException) else error.__context__
    if isinstance(value_error, OmegaConfBaseException):
        if file := _FILE.match(str(error)):
            return f"{file[1]}: {_misplaced(file[2], value_error) or _wrong_value(value_error)}"
        message = _wrong_value(value_error)
        return f"{message}; {_instead('pipeline')}" if message.endswith(_NO_MERGE) else message
    return _restated(str(error))


def uncaught(error: Exception, arguments: Sequence[str]) -> str | None:
    """Return the message for an error of Hydra's or OmegaConf's own that names no key.

    It is not in :data:`COMPOSITION_ERRORS` and was raised before any job began. Two mistakes end in
    one: a value that cannot be the name of a file of a group, and a key below a section that is
    null, which OmegaConf 2.3 cannot fill from the command line.
    """
    given = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    overrides = OverridesParser.create().parse_overrides(given)
    if isinstance(error, AssertionError | AttributeError) and "NoneType" in str(error):
        return next(filter(None, map(_below_null, overrides)), None)
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return next(filter(None, map(_no_name, overrides)), None)
    return None


def _below_null(override: Override) -> str | None:
    for section, keys in _optional_sections(Kvpipe):
        if f"{override.key_or_group}.".startswith(f"{section}."):
            return (
                f"{override.input_line}: {section} is null, which the command line cannot change; "
                f"write {section} with its keys ({', '.join(keys)}) into an experiment file"
            )
    return None


def _no_name(override: Override) -> str | None:
    group, value = override.key_or_group, override.value()
    if "." in group or isinstance(value, str | list):
        return None
    return (
        f"{override.input_line} chooses a file of conf/{group} by its name, and a value of type "
        f"{type(value).__name__} is no name; {_instead(group)}"
    )


def _instead(group: str) -> str:
    """Return the valid spelling if a group was given something other than a file's name."""
    if group == "pipeline":
        return (
            "for a list of steps, write '# @package _global_' and below it 'pipeline: [STEP, STEP]' "
            "into DIR/pipeline/NAME.yaml, and choose it: --config-dir DIR pipeline=NAME; to change "
            "single steps: pipeline_edit.after.STEP=NEW, pipeline_edit.before.STEP=NEW, "
            "pipeline_edit.replace.STEP=NEW, pipeline_edit.remove=STEP"
        )
    if group == "experiment":
        return "to name the run, set label=NAME"
    if keys := _section(group):
        return f"its keys are set one by one: {group}.{keys[0]}=VALUE"
    return "a value goes into an experiment file"


def _optional_sections(cls: type, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the sections of the schema that may be null, with their keys."""
    for name, hint in get_type_hints(cls).items():
        if _keys(hint):
            yield from _optional_sections(hint, f"{path}{name}.")
        for kind in get_args(hint):
            if keys := _keys(kind):
                yield f"{path}{name}", keys


def _no_such_file(error: MissingConfigException) -> str:
    file = error.missing_cfg_file or ""
    # The name may be a path, such as Qwen/Qwen3-4B; Hydra's own groups have two parts.
    group, _, name = file.rpartition("/") if file.startswith("hydra/") else file.partition("/")
    if not name:
        return _first_line(error)
    if extra := _OF_EXTRAS.get(error.missing_cfg_file or ""):
        return f"{group}: it needs kvpipe's extra {extra!r}; in a clone: pip install '.[{extra}]'"
    if error.options is None:
        return (
            f"{group}=[...] chooses files of conf/{group}, and {name!r} is none of them; "
            f"{_instead(group)}"
        )
    message = f"there is no {group} {name!r}; {nearest(name, error.options)}"
    return (
        f"{message}; {_instead(group)}" if "valid are" in message and _section(group) else message
    )


def _section(group: str) -> list[str]:
    """Return the keys of the section of the config that a group fills; none of other groups."""
    return _keys(get_type_hints(Kvpipe).get(group))


def _misplaced(group: str, error: OmegaConfBaseException) -> str | None:
    """Return what is wrong with a file of a group whose keys are all in the wrong place."""
    first, second = [*str(error.full_key).split("."), ""][:2]
    if group in _GLOBAL:
        whole = error.msg and (_NO_MERGE in error.msg or "'DictConfig' to string" in error.msg)
        inside = first == group == "sweep" and second in [*_keys(Kvpipe), "hydra"]
        return _HEADER if whole or inside else None
    if first == second == group:
        return f"the file's keys are those of {group}, without '{group}:' above them"
    return None


def _unreadable(error: OverrideParseException) -> str:
    argument = error.override
    if "=" not in argument and not argument.startswith("~"):
        return f"cannot read the argument {argument!r}: write KEY=VALUE; a verb comes first"
    return (
        f"cannot read the argument {argument!r}; put quotes around a value with special "
        "characters, once for the shell and once for Hydra: 'KEY=\"VALUE\"'"
    )


def _wrong_value(error: OmegaConfBaseException) -> str:
    where = f"{error.full_key}: " if error.full_key else ""
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        keys = _keys(error.object_type)
        hint = f"; {nearest(str(error.key), keys)}" if keys else ""
        return f"{where}there is no such key{hint}"
    if isinstance(error, MissingMandatoryValue):
        return f"{where}it has no value, and there is no default"
    if _NO_LIST in str(error):
        return f"{where}it must be a list: [A, B]"
    return where + _first_line(error)


def _restated(message: str) -> str:
    if ambiguous := _AMBIGUOUS.match(message):
        return (
            f"{ambiguous[1]}: a comma separates the values of a sweep; add -m to sweep over them, "
            "write [...] for a list, or quote a text: 'KEY=\"A, B\"'"
        )
    if not_chosen := _NOT_CHOSEN.match(message):
        said = f"{not_chosen[1]} has no default to override; write {not_chosen[2]}"
        return f"{said}; {_instead('experiment')}" if not_chosen[1] == "experiment" else said
    if forced := _FORCED.match(message):
        return f"{forced[1]} chooses files of conf/{forced[1]}, without '++'; {_instead(forced[1])}"
    if inside := _IN_PACKAGE.match(message):
        return f"{inside[1]}: {_HEADER}"
    return " ".join(message.split())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _keys(object_type: Any) -> list[str]:
    """Return the keys of a structured config; for any other type they are unknown, so none."""
    if not (isinstance(object_type, type) and is_dataclass(object_type)):
        return []
    return [field.name for field in fields(object_type)]
