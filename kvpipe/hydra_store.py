"""The schema, in the store from which Hydra takes typed configs."""

from typing import Any

from hydra.core.config_store import ConfigStore

from kvpipe.schema import schema

# What conf/config.yaml calls it.
_NAME = "kvpipe_schema"


def store_schema() -> None:
    """Put the schema into the store of this process, and keep Hydra from copying that store.

    hydra-core 1.3.8 copies all of its store, plugins and all, for each group that ``--help`` lists and
    for each config that it composes: 1 s of the 1.7 s that ``--help`` took. The store is one for
    the process, and what is taken out of it is copied anyway. This can go with the release whose
    ``CachingConfigRepository`` does not copy its sources.
    """
    ConfigStore.instance().store(name=_NAME, node=schema())
    ConfigStore.__deepcopy__ = _itself  # pyright: ignore[reportAttributeAccessIssue]


def _itself(store: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    del memo
    return store
