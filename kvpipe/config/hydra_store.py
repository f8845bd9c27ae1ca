"""Register the schema in the store from which Hydra reads typed configs, and a resolver."""

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from kvpipe.config.schema import schema

# Its name in conf/config.yaml.
_NAME = "kvpipe_schema"


def store_schema() -> None:
    """Put the schema into this process's store, and keep Hydra from copying that store.

    hydra-core 1.3.8 copies its whole store, plugins included, for each group that ``--help`` lists
    and for each config that it composes: 1 s of the 1.7 s that ``--help`` took. The store is a
    singleton, and Hydra copies each entry that it reads anyway. Remove this once
    ``CachingConfigRepository`` no longer copies its sources.
    """
    ConfigStore.instance().store(name=_NAME, node=schema())
    ConfigStore.__deepcopy__ = lambda self, memo: self  # pyright: ignore[reportAttributeAccessIssue]


def _chosen(group: str, default: str) -> str:
    """Return the name of the file that the command line chooses of a group, for ``conf/``."""
    hydra = HydraConfig.instance().cfg
    return (hydra and hydra.hydra.runtime.choices.get(group)) or default


# When the module is imported: a launcher may unpickle the task of a job in another process.
OmegaConf.register_new_resolver("chosen", _chosen, replace=True)
