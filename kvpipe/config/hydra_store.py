"""Register the schema and a resolver with Hydra, bound the YAML files, and compose a config once."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, _utils
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from kvpipe.config.schema import schema

# Its name in conf/config.yaml.
_NAME = "kvpipe_schema"
# Most values in a YAML file, with its aliases expanded, as OmegaConf does it.
_MOST_VALUES = 250_000
_unbounded_loader = _utils.get_yaml_loader
_load_configuration = ConfigLoaderImpl.load_configuration


def store_schema() -> None:
    """Put the schema into this process's store, and keep Hydra from copying that store.

    hydra-core 1.3.8 copies its whole store, plugins included, for each group that ``--help`` lists
    and for each config that it composes: 1 s of the 1.7 s that ``--help`` took. The store is a
    singleton, and Hydra copies each entry that it reads anyway. Remove this once
    ``CachingConfigRepository`` no longer copies its sources.
    """
    ConfigStore.instance().store(name=_NAME, node=schema())
    ConfigStore.__deepcopy__ = lambda self, memo: self  # pyright: ignore[reportAttributeAccessIssue]
    _utils.get_yaml_loader = _bounded_loader
    ConfigLoaderImpl.load_configuration = _composed_once()


def _composed_once() -> Callable[..., DictConfig]:
    """Return Hydra's composition, which keeps the config that it composed to read ``hydra.mode``.

    Hydra composes each config twice: first to see whether it is a sweep. Remove this once
    ``Hydra.run`` takes over what ``Hydra.get_mode`` has composed.
    """
    kept: list[tuple[list[str], DictConfig]] = []

    def compose(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if not validate_sweep_overrides and not any(o.is_sweep_override() for o in parsed):
            composed = _load_configuration(self, config_name, overrides, RunMode.RUN)
            kept[:] = [([*overrides], composed)]
            return composed
        before, composed = kept.pop() if kept else ([], None)
        added = overrides[len(before) :]
        if composed and run_mode is RunMode.RUN and overrides == [*before, *added[:1]]:
            if not added:
                return composed
            # What Hydra adds where the config says nothing.
            if added == ["hydra.mode=RUN"]:
                composed.hydra.mode = RunMode.RUN
                composed.hydra.overrides.hydra += added
                return composed
        return _load_configuration(
            self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides
        )

    return compose


@cache
def _bounded_loader() -> Any:
    """Return OmegaConf's loader, which refuses a file that a few aliases make endless.

    libyaml scans it, in a tenth of the time. It is composed in Python all the same: the composer in
    C ends the process where a file is nested too deeply.
    """
    unbounded: Any = _unbounded_loader()

    class Bounded(unbounded):
        def __init__(self, stream: Any) -> None:
            # A PyYAML that was built without libyaml has only the other.
            events = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(stream)
            self.check_event, self.peek_event = events.check_event, events.peek_event
            self.get_event, self.dispose = events.get_event, events.dispose
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

        def get_single_node(self) -> yaml.Node | None:
            try:
                node = super().get_single_node()
                values = _values(node, {})
            except RecursionError:
                raise yaml.MarkedYAMLError(
                    problem="it is nested too deeply",
                    problem_mark=self.peek_event().start_mark,
                ) from None
            if node and values > _MOST_VALUES:
                count = f"{values:,}" if values < math.inf else "infinitely many"
                raise yaml.MarkedYAMLError(
                    problem=f"with its aliases it has {count} values, at most {_MOST_VALUES:,}",
                    problem_mark=node.end_mark,
                )
            return node

    return Bounded


def _values(node: yaml.Node | None, counted: dict[int, float]) -> float:
    """Return how many values a node has with its aliases expanded; an alias is the same node."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        # A node that contains itself has infinitely many.
        counted[id(node)] = math.inf
        pairs = isinstance(node, yaml.MappingNode)
        items = [item for pair in node.value for item in pair] if pairs else node.value
        counted[id(node)] = 1 + sum(_values(item, counted) for item in items)
    return counted[id(node)]


def _chosen(group: str, default: str) -> str:
    """Return the name of the file that the command line chooses of a group, for ``conf/``."""
    config: Any = HydraConfig.instance().cfg
    return (config and config.hydra.runtime.choices.get(group)) or default


# When the module is imported: a launcher may unpickle the task of a job in another process.
OmegaConf.register_new_resolver("chosen", _chosen, replace=True)
