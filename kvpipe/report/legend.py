"""What colours stand for: the names of the pools, and the entries of a legend."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvpipe.ledger import KV, OTHER, PARAMS, PROGRAM, slot_pool

_POOL_NAMES = {
    PARAMS: "parameters",
    KV: "KV cache",
    PROGRAM: "programs",
    OTHER: "other arrays",
}


def pool_name(pool: str) -> str:
    """Return what people call a pool."""
    if pool.startswith(slot_pool("")):
        return f"slot {pool.removeprefix(slot_pool(''))}"
    return _POOL_NAMES.get(pool, pool)


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        role: the colour.
        text: what it stands for.
        form: ``thin``, ``pale``, ``line`` or ``whisker`` for what is drawn so.
    """

    role: str
    text: str
    form: str = ""


def pool_keys(roles: Mapping[str, str]) -> list[Key]:
    """Return an entry for each pool."""
    return [Key(role, pool_name(pool)) for pool, role in roles.items()]
