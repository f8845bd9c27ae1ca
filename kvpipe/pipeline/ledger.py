"""The memory ledger: exact bytes per device, by the pool that owns them.

A pool is ``params``, ``kv``, ``program``, ``slot:<name>``, ``other`` or ``padding``; a plan keeps the
trainer's programs apart from the engine's, as ``program:trainer``. Bytes are integers; no rounding
happens here. The plan predicts a ledger for each step, the probe measures one, and
:func:`differences` compares the two. A :class:`Change` is the effect of one verb on the bytes in
use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

PARAMS = "params"
KV = "kv"
PROGRAM = "program"
TRAINER_PROGRAM = "program:trainer"
OTHER = "other"
UNOWNED = "unowned"
"""Arrays of the pool other that nobody owns."""
PADDING = "padding"
"""The bytes that the devices give all arrays beyond what these ask for; every other pool of arrays
has the bytes that were asked for."""

PerDevice = tuple[int, ...]

GRADIENTS, TRAIN_STEP, WEIGHT_SYNC = "gradients", "train_step", "weight_sync"
POLICY_SCORES = "policy_scores"
TRAINER_PROGRAMS = (GRADIENTS, TRAIN_STEP, WEIGHT_SYNC, POLICY_SCORES)
"""The trainer's programs: the gradients of a micro-batch, the update of its tree, the transfer of
that tree into the engine, and its forward pass over samples."""

KV_ZEROS, KV_TAKE, KV_PUT = "kv_zeros", "kv_take", "kv_put"
KV_PROGRAMS = (KV_ZEROS, KV_TAKE, KV_PUT)
"""kvpipe's programs on the KV cache: make it, copy a block of it out, write one into it."""
WEIGHT_DIGEST = "weight_digest"
"""kvpipe's programs that sum the digest of each kind of parameter, counted as one."""
OWN_PROGRAMS = (*TRAINER_PROGRAMS, *KV_PROGRAMS)
"""The programs that are not the engine's."""


class Size(StrEnum):
    """Size of a pool, by a name that a phase knows before anything is loaded.

    The last two belong to no pool: the arrays of a start with random weights at its peak, and the
    largest parameter.
    """

    NOTHING = "nothing"
    PARAMS = "params"
    KV = "kv"
    PROGRAM = "program"
    TRAINER_PROGRAM = "program:trainer"
    TRAINER_PARAMS = "trainer_params"
    TRAINER_GRADIENTS = "trainer_gradients"
    TRAINER_MOMENTS = "trainer_moments"
    DUMMY_START = "dummy_start"
    LEAF = "leaf"


TRAINER_SETS = (Size.TRAINER_PARAMS, Size.TRAINER_GRADIENTS, Size.TRAINER_MOMENTS)
"""The trainer's sets of arrays. Each is in the slot of its own name."""


@dataclass(frozen=True)
class KvTokens:
    """Size of a KV cache with a capacity of its own, in tokens, rounded down to whole pages."""

    tokens: int


PoolSize = Size | KvTokens


def slot_pool(name: str) -> str:
    """Return the pool of the device slot ``name``."""
    return f"slot:{name}"


@dataclass(frozen=True)
class Ledger:
    """Bytes per device for each pool; pools of no bytes are left out."""

    devices: int
    pools: Mapping[str, PerDevice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pool, sizes in self.pools.items():
            if len(sizes) != self.devices:
                raise ValueError(f"pool {pool!r} has {len(sizes)} devices, not {self.devices}")

    def of(self, pool: str) -> PerDevice:
        """Return the bytes that ``pool`` holds on each device."""
        return self.pools.get(pool, (0,) * self.devices)

    def sum_of(self, pool: str) -> int:
        """Return the bytes that ``pool`` holds over all devices."""
        return sum(self.of(pool))

    def with_pool(self, pool: str, sizes: PerDevice) -> "Ledger":
        """Return this ledger with ``pool`` holding ``sizes`` instead of what it held."""
        pools = {name: held for name, held in self.pools.items() if name != pool}
        if any(sizes):
            pools[pool] = sizes
        return Ledger(self.devices, pools)

    def totals(self) -> dict[str, int]:
        """Return the bytes over all devices for each pool."""
        return {pool: sum(sizes) for pool, sizes in self.pools.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes over all pools and devices."""
        return sum(self.totals().values())

    @property
    def per_device(self) -> PerDevice:
        """Bytes over all pools, for each device."""
        return tuple(sum(sizes[i] for sizes in self.pools.values()) for i in range(self.devices))


@dataclass(frozen=True)
class Change:
    """Change of the bytes in use that a verb of the engine or of the trainer caused.

    All bytes are over all devices.

    Attributes:
        nbytes: bytes of the arrays that it freed or placed, as the bytes in use are counted: with
            padding where the devices count by themselves.
        changed_bytes: bytes in use after it minus before it, measured.
        replaced_bytes: bytes of the arrays that the placed ones replaced.
        fields: fields for the record of the phase.
    """

    nbytes: int
    changed_bytes: int
    replaced_bytes: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def freed_bytes(self) -> int:
        """Freed bytes."""
        return -self.changed_bytes

    def with_fields(self, **fields: Any) -> Self:
        """Return this change with more fields for the record."""
        return replace(self, fields={**self.fields, **fields})


def is_contracted(pool: str) -> bool:
    """Whether the plan holds ``pool`` to the byte (what kvpipe and the engine own)."""
    return pool in (PARAMS, KV) or pool.startswith("slot:")


def differences(planned: Ledger, measured: Ledger) -> dict[str, int]:
    """Return measured minus planned bytes, over all devices, for each contracted pool.

    A pool whose per-device split differs while its sum agrees is reported by the largest
    difference of one device, so that it cannot pass.
    """
    pools = [p for p in {**planned.pools, **measured.pools} if is_contracted(p)]
    found: dict[str, int] = {}
    for pool in sorted(pools):
        pairs = list(zip(measured.of(pool), planned.of(pool), strict=True))
        found[pool] = sum(m - p for m, p in pairs) or max((m - p for m, p in pairs), key=abs)
    return found
