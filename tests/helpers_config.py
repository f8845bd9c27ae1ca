"""Compose configs as the command line does, in this process and without a run directory."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl as loader
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig

from kvpipe.config.hydra_store import store_schema
from kvpipe.config.schema import Kvpipe, from_plain, to_plain
from kvpipe.pipeline.phase import Phase
from kvpipe.pipeline.steps import build_steps
from kvpipe.system.places import CONF

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))


def compose_plain(*overrides: str) -> dict[str, Any]:
    """Return the composed config as plain values, which are the caller's own."""
    return deepcopy(_composed(*overrides))


@cache
def _composed(*overrides: str) -> dict[str, Any]:
    store_schema()
    with (
        pytest.MonkeyPatch.context() as patch,
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        compose_shipped_files_once(patch)
        return to_plain(compose("config", overrides=list(overrides)))


@cache
def _default_phases() -> tuple[list[str], dict[str, dict[str, Any]]]:
    plain = compose_plain()
    return plain["pipeline"], plain["phases"]


def compose_shipped_files_once(patch: pytest.MonkeyPatch) -> None:
    """Let Hydra parse conf/ once, and merge it once for each choice of its files.

    That is nine tenths of what composing costs; values of the command line come after it.
    """
    for kind, parse in _parse.items():
        patch.setattr(kind, "load_config", _remembering(parse))
    patch.setattr(loader, "create_defaults_list", _defaults_list)
    patch.setattr(loader.ConfigLoaderImpl, "_compose_config_from_defaults_list", _merged)


# Hydra executes the modules of its plugins itself: the classes that an import gives are others.
Plugins.instance()
_kinds = map(SourcesRegistry.instance().resolve, ("file", "pkg"))
_parse = {kind: kind.load_config for kind in _kinds}
_parsed: dict[tuple[str, str], bytes] = {}


def _remembering(
    parse: Callable[[Any, str], ConfigResult],
) -> Callable[[ConfigSource, str], ConfigResult]:
    def load(source: ConfigSource, config_path: str) -> ConfigResult:
        if source.scheme() == "file" and source.path != str(CONF):
            return parse(source, config_path)
        key = (source.path, config_path)
        if key not in _parsed:
            _parsed[key] = pickle.dumps(parse(source, config_path))
        return pickle.loads(_parsed[key])

    return load


_list, _merge = (
    loader.create_defaults_list,
    loader.ConfigLoaderImpl._compose_config_from_defaults_list,
)
_results: dict[Any, bytes] = {}


def _once[T](repo: IConfigRepository, key: Any, work: Callable[[], T]) -> T:
    """Return what ``work`` returned before, in a copy, if only files that never change are read."""
    places = {source.path for source in repo.get_sources() if source.scheme() == "file"}
    if places != {str(CONF)}:
        return work()
    if key not in _results:
        _results[key] = pickle.dumps(work())
    return pickle.loads(_results[key])


def _defaults_list(
    repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **how: bool
) -> DefaultsList:
    values = Overrides(repo, overrides_list).config_overrides
    files = [override for override in overrides_list if override not in values]
    key = (config_name, *(override.input_line for override in files), *sorted(how.items()))
    found = _once(repo, key, lambda: _list(repo, config_name, files, **how))
    found.config_overrides = found.overrides.config_overrides = values
    return found


def _merged(
    hydra: loader.ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository
) -> DictConfig:
    return _once(repo, repr(defaults), lambda: _merge(hydra, defaults, repo))


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
