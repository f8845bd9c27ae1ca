"""A config that the tests compose is the one that Hydra composes."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvpipe.config.hydra_store import store_schema
from kvpipe.system.places import CONF
from tests.helpers_config import compose_shipped_files_once

FILES = ["+experiment=tiny_grpo", "hydra/launcher=slurm"]
VALUES = ["engine.tp_size=4", "+phases.jax_ready.use=jax_ready"]
WAYS = [
    [],
    FILES,
    [*FILES, *VALUES],
    VALUES,
    [*VALUES, "engine.tp_size=8"],
    ["~prompts", "sampling.seed=3"],
]


def composed(ways: list[list[str]]) -> list[Any]:
    """Return the configs of several command lines, with Hydra's own part."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [compose("config", way, return_hydra_config=True) for way in ways]
    return [OmegaConf.to_container(config, resolve=False) for config in configs]


def test_what_is_composed_from_memory_is_what_hydra_composes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_schema()
    expected = composed(WAYS)
    compose_shipped_files_once(monkeypatch)
    assert composed(WAYS) == expected
    assert composed(WAYS[::-1]) == expected[::-1]
