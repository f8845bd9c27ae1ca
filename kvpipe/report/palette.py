"""Colours by role, light and dark, for pages, SVG and PNG; the roles, names and kinds of pools.

Pools have the colours of Okabe and Ito, which people with any colour vision can tell apart.
Contrast to the ground: at least 3:1 for a pool, 4.5:1 for a text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpipe.pipeline.ledger import KV, OTHER, PADDING, PARAMS, PROGRAM, TRAINER_PROGRAM, slot_pool

# Role -> its colour on a light and on a dark ground.
_COLOURS = {
    "ground": ("#ffffff", "#14171a"),
    "raised": ("#f5f6f7", "#1d2125"),
    "ink": ("#1b1f24", "#e8eaed"),
    "quiet": ("#57606a", "#a4adb8"),
    "grid": ("#dfe3e8", "#343a41"),
    "good": ("#0b6b3a", "#5fd08d"),
    "bad": ("#b42318", "#ff8a7d"),
    "link": ("#0b5cad", "#7cb8ff"),
    "pool-params": ("#0072b2", "#4ba3dd"),
    "pool-kv": ("#d98200", "#f0a52e"),
    "pool-slot0": ("#009e73", "#2fc498"),
    "pool-slot1": ("#00664b", "#a5ecd8"),
    "pool-slot2": ("#7d4bb0", "#c9a4f2"),
    "pool-program": ("#b2548c", "#d88ab6"),
    "pool-other": ("#7d8590", "#9aa4af"),
    "pool-total": ("#4b5563", "#aab4c0"),
    "pool-host": ("#6b5b95", "#a797d6"),
    "peak": ("#1b1f24", "#e8eaed"),
    "limit": ("#b42318", "#ff8a7d"),
}
LIGHT: Mapping[str, str] = {role: light for role, (light, _) in _COLOURS.items()}
DARK: Mapping[str, str] = {role: dark for role, (_, dark) in _COLOURS.items()}

FADED = 0.45
# A trainer has three slots: parameters, gradients, moments.
_SLOTS = 3
# Role and name of each pool that is no slot.
_POOLS = {
    PARAMS: ("pool-params", "parameters"),
    KV: ("pool-kv", "KV cache"),
    PROGRAM: ("pool-program", "programs"),
    OTHER: ("pool-other", "other arrays"),
    PADDING: ("pool-other", "padding"),
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend; ``form`` may be ``thin``, ``pale``, ``line`` or ``whisker``."""

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


def pool_kinds(pools: Mapping[str, int]) -> Counter[str]:
    """Return the bytes of a ledger by kind of pool, as summaries have columns for them.

    The slots are of the kind ``slots``, all programs of the kind ``program``, any other pool is one
    of its own.
    """
    kinds: Counter[str] = Counter()
    for pool, size in pools.items():
        slot = pool.startswith(slot_pool(""))
        kinds["slots" if slot else PROGRAM if pool == TRAINER_PROGRAM else pool] += size
    return kinds
