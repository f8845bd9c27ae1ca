"""Register the schema and a resolver with Hydra, and bound the YAML files that it reads."""

import math
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, _utils

from kvpipe.config.schema import schema

# Its name in conf/config.yaml.
_NAME = "kvpipe_schema"
# Most values in a YAML file, with its aliases expanded, as OmegaConf does it.
_MOST_VALUES = 250_000
_unbounded_loader = _utils.get_yaml_loader


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


def _bounded_loader() -> Any:
    """Return OmegaConf's loader, made to refuse a file whose aliases expand to too many values."""

    class Bounded(_unbounded_loader()):
        def get_single_node(self) -> yaml.Node | None:
            try:
                node = super().get_single_node()
                values = _values(node, {})
            except RecursionError:
                raise yaml.MarkedYAMLError(
                    problem="it is nested too deeply", problem_mark=self.get_mark()
                ) from None
            if values > _MOST_VALUES:
                count = f"{values:,}" if values < math.inf else "infinitely many"
                raise yaml.MarkedYAMLError(
                    problem=f"with its aliases it has {count} values, at most {_MOST_VALUES:,}",
                    problem_mark=self.get_mark(),
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
