"""Reconcile the environment's ``WANDB_*`` variables with ``tracking``, which takes precedence.

A variable fills a key that the config leaves null. No other variable that describes a W&B run is read
(:mod:`kvpipe.sinks.wandb` clears them): each run is a new one, uploaded as the config says.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from kvpipe.config.schema import TrackingConfig

_FILLED = {"WANDB_ENTITY": "entity", "WANDB_NAME": "name", "WANDB_RUN_GROUP": "group"}
_DECIDED = {**_FILLED, "WANDB_MODE": "mode", "WANDB_PROJECT": "project", "WANDB_TAGS": "tags"}
_CONTINUE_A_RUN = (
    "WANDB_FORK_FROM",
    "WANDB_LAUNCH",
    "WANDB_RESUME",
    "WANDB_RESUME_FROM",
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
)
_WITHOUT_A_KEY = ("WANDB_DIR", "WANDB_IGNORE_GLOBS", "WANDB_JOB_TYPE", "WANDB_NOTES")
_DISABLED = "WANDB_DISABLED"
OWN_TO_THE_CONFIG = (*_DECIDED, *_CONTINUE_A_RUN, *_WITHOUT_A_KEY, _DISABLED)
"""Variables that wandb must not see: it would refuse some values, which nothing reads."""
_NO = ("", "0", "f", "false", "n", "no")


def with_wandb_variables(plain: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the config with the names from the environment for those that it leaves null."""
    tracking = plain["tracking"]
    given = {
        key: environ[variable]
        for variable, key in _FILLED.items()
        if environ.get(variable) and tracking[key] is None
    }
    return {**plain, "tracking": tracking | given}


def variable_messages(tracking: TrackingConfig, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a message for each variable that fills a key, or that is ignored and differs from one.

    The config is one that :func:`with_wandb_variables` has completed.
    """
    for variable, key in _DECIDED.items():
        text, used = environ.get(variable), getattr(tracking, key)
        shown = used.value if isinstance(used, Enum) else used
        if not text:
            continue
        if text != (",".join(used) if isinstance(used, list) else shown):
            yield f"{variable} is not read: tracking.{key} is {shown!r}"
        elif variable in _FILLED:
            yield f"tracking.{key} is {shown!r}, from {variable}"
    if environ.get(_DISABLED, "").lower() not in _NO:
        yield f"{_DISABLED} is not read: tracking.mode is {tracking.mode.value!r}"
    if found := [variable for variable in _CONTINUE_A_RUN if environ.get(variable)]:
        yield f"not read: {', '.join(found)}; each run is a new W&B run"
    if found := [variable for variable in _WITHOUT_A_KEY if environ.get(variable)]:
        yield f"not read: {', '.join(found)}; W&B gets what the config says, in the run directory"
