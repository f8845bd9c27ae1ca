"""The machines that a plan can be for: how many devices they have, and how much memory each."""

import math
import re
from dataclasses import dataclass

import psutil

from kvpipe.errors import InputError
from kvpipe.jax_environment import cpu_devices
from kvpipe.schema import EngineConfig
from kvpipe.suggest import nearest

CPU = "cpu"
DEFAULT_TPU = "v4:2x2x1"
"""What ``engine.device=tpu`` is planned for if nothing else is said: a v4-8, the SOP's machine."""

_GIB = 1024**3

# Published HBM of a chip, from the "System architecture" pages of Google's Cloud TPU documentation
# (https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e). A chip is one device: the two cores of a
# v4 or v5p share its HBM and are used as one (megacore), v5e and v6e have one core. What the
# runtime keeps for itself is not published, and is not taken off here.
_HBM_BYTES = {"v4": 32 * _GIB, "v5e": 16 * _GIB, "v5p": 95 * _GIB, "v6e": 32 * _GIB}
_EXAMPLES = [CPU, *(f"{chip}:2x2x1" for chip in _HBM_BYTES)]

_TOPOLOGY = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")


@dataclass(frozen=True)
class Target:
    """A machine to plan for.

    Attributes:
        name: ``cpu``, or chip and topology, e.g. ``v4:2x2x1``.
        devices: number of devices.
        hbm_bytes: bytes of memory that one device has.
    """

    name: str
    devices: int
    hbm_bytes: int


def find_target(name: str | None, engine: EngineConfig) -> Target:
    """Return the machine to plan for.

    Args:
        name: ``cpu`` for this host, or a chip and its topology, e.g. ``v5e:2x2x1``; None is ``cpu``
            for ``engine.device=cpu`` and :data:`DEFAULT_TPU` for ``tpu``.
        engine: its mesh has to take all devices.

    Raises:
        InputError: there is no such target, or tp × dp is not its number of devices.
    """
    if name is None:
        name = CPU if engine.device == "cpu" else DEFAULT_TPU
    target = _host(engine) if name == CPU else _tpu(name)
    tp_size = engine.tp_size or max(target.devices // engine.dp_size, 1)
    if tp_size * engine.dp_size != target.devices:
        raise InputError(
            f"engine.tp_size × engine.dp_size is {tp_size} × {engine.dp_size}, but {target.name} "
            f"has {target.devices} devices; the product has to be {target.devices}"
        )
    return target


def _host(engine: EngineConfig) -> Target:
    """Return this host, or several like it; virtual devices have an equal part of their host each."""
    devices = cpu_devices(engine)
    return Target(CPU, devices, psutil.virtual_memory().total // (devices // engine.nnodes))


def _tpu(name: str) -> Target:
    chip, colon, topology = name.partition(":")
    if chip not in _HBM_BYTES:
        raise InputError(f"plan.target is {name!r}; {nearest(name, _EXAMPLES)}")
    if not colon or not _TOPOLOGY.fullmatch(topology):
        raise InputError(
            f"plan.target is {name!r}; write the chip and its topology, e.g. {chip}:2x2x1"
        )
    sizes = [int(size) for size in topology.split("x")]
    if len(sizes) == 2:  # as v5e's and v6e's are published; libtpu wants three
        sizes.append(1)
    canonical = f"{chip}:{'x'.join(map(str, sizes))}"
    return Target(canonical, math.prod(sizes), _HBM_BYTES[chip])
