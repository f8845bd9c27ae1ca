"""Compose configs as the command line does, in this process and without a run directory."""

from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from kvpipe.hydra_store import store_schema
from kvpipe.phase import Phase
from kvpipe.schema import Kvpipe, from_plain, to_plain
from kvpipe.steps import build_steps

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))


def compose_plain(*overrides: str) -> dict[str, Any]:
    """Return the composed config as plain values, which are the caller's own."""
    store_schema()
    with initialize_config_module("conf", version_base="1.3"):
        return to_plain(compose("config", overrides=list(overrides)))


@cache
def _default_phases() -> tuple[list[str], dict[str, dict[str, Any]]]:
    plain = compose_plain()
    return plain["pipeline"], plain["phases"]


def default_names() -> list[str]:
    """Return the names of the default pipeline's steps."""
    return list(_default_phases()[0])


def build(names: list[str], **options: dict[str, Any]) -> tuple[Phase, ...]:
    """Return steps: those of the default pipeline by name, others as ``options`` says.

    Args:
        names: the pipeline.
        options: step name → options, over those of the default pipeline.
    """
    known = _default_phases()[1]
    phases = {name: known.get(name, {}) | options.get(name, {}) for name in names}
    return build_steps(Kvpipe(pipeline=names, phases=phases))


def config_of(plain: dict[str, Any]) -> Kvpipe:
    """Return the typed config of plain values."""
    return from_plain(plain)
