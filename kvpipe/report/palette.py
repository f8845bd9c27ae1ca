"""Colours by role, light and dark, for pages, SVG and PNG; the roles and names of pools.

Pools have the colours of Okabe and Ito, which people with any colour vision can tell apart.
Contrast to the ground: at least 3:1 for a pool, 4.5:1 for a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpipe.ledger import KV, OTHER, PARAMS, PROGRAM, slot_pool

LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "raised": "#f5f6f7",
    "ink": "#1b1f24",
    "quiet": "#57606a",
    "grid": "#dfe3e8",
    "good": "#0b6b3a",
    "bad": "#b42318",
    "link": "#0b5cad",
    "pool-params": "#0072b2",
    "pool-kv": "#d98200",
    "pool-slot0": "#009e73",
    "pool-slot1": "#00664b",
    "pool-slot2": "#7d4bb0",
    "pool-program": "#b2548c",
    "pool-other": "#7d8590",
    "pool-total": "#4b5563",
    "pool-host": "#6b5b95",
    "peak": "#1b1f24",
    "limit": "#b42318",
}

DARK: Mapping[str, str] = {
    "ground": "#14171a",
    "raised": "#1d2125",
    "ink": "#e8eaed",
    "quiet": "#a4adb8",
    "grid": "#343a41",
    "good": "#5fd08d",
    "bad": "#ff8a7d",
    "link": "#7cb8ff",
    "pool-params": "#4ba3dd",
    "pool-kv": "#f0a52e",
    "pool-slot0": "#2fc498",
    "pool-slot1": "#a5ecd8",
    "pool-slot2": "#c9a4f2",
    "pool-program": "#d88ab6",
    "pool-other": "#9aa4af",
    "pool-total": "#aab4c0",
    "pool-host": "#a797d6",
    "peak": "#e8eaed",
    "limit": "#ff8a7d",
}

FADED = 0.45
# A trainer has three slots: parameters, gradients, moments.
_SLOTS = 3
# Role and name of each pool that is no slot.
_POOLS = {
    PARAMS: ("pool-params", "parameters"),
    KV: ("pool-kv", "KV cache"),
    PROGRAM: ("pool-program", "programs"),
    OTHER: ("pool-other", "other arrays"),
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        role: its colour.
        text: the meaning.
        form: ``thin``, ``pale``, ``line`` or ``whisker`` for a mark of that form.
    """

    role: str
    text: str
    form: str = ""


def pool_name(pool: str) -> str:
    """Return the name of a pool for people."""
    if pool.startswith(slot_pool("")):
        return f"slot {pool.removeprefix(slot_pool(''))}"
    return _POOLS.get(pool, ("", pool))[1]


def pool_roles(pools: Sequence[str]) -> dict[str, str]:
    """Return the role of each pool; slots take theirs in turn."""
    slots = [pool for pool in pools if pool.startswith(slot_pool(""))]
    roles = {pool: f"pool-slot{index % _SLOTS}" for index, pool in enumerate(slots)}
    return {pool: roles.get(pool) or _POOLS.get(pool, ("pool-total",))[0] for pool in pools}


def pool_keys(pools: Sequence[str]) -> list[Key]:
    """Return a legend's entry for each pool."""
    return [Key(role, pool_name(pool)) for pool, role in pool_roles(pools).items()]
