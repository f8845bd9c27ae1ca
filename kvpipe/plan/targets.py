"""The machines that a plan can target: number of devices, and memory of each."""

import math
import re
from dataclasses import dataclass

from kvpipe.config.jax_environment import cpu_devices
from kvpipe.config.schema import EngineConfig
from kvpipe.errors import InputError
from kvpipe.suggest import nearest
from kvpipe.system.process_memory import host_memory_bytes
from kvpipe.units import counted

CPU = "cpu"
DEFAULT_TPU = "v4:2x2x1"
"""Default target for ``engine.device=tpu``: a v4-8, the machine of the SOP."""

_GIB = 1024**3

# Published HBM per chip, from the "System architecture" pages of Google's Cloud TPU documentation
# (https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e). A chip is one device: the two cores of a
# v4 or v5p share its HBM and act as one (megacore); v5e and v6e have one core. The runtime's own
# share is not published, so it is not subtracted here.
_HBM_BYTES = {"v4": 32 * _GIB, "v5e": 16 * _GIB, "v5p": 95 * _GIB, "v6e": 32 * _GIB}
_EXAMPLES = [CPU, *(f"{chip}:2x2x1" for chip in _HBM_BYTES)]
_VALID = f"valid are: {', '.join(_EXAMPLES)}, or an accelerator type, e.g. v5e-8"

_TOPOLOGY = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")

# Topology of each accelerator type, from the same pages. The number in the name counts TensorCores,
# two per chip, for v4 and v5p, and chips for v5e and v6e.
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
_SQUARES = "1x1x1 2x2x1 2x4x1 4x4x1 4x8x1 8x8x1 8x16x1 16x16x1"
_SHAPES = {"v4": (2, _CUBES), "v5p": (2, _CUBES), "v5e": (1, _SQUARES), "v6e": (1, _SQUARES)}
_TYPES = {
    f"{chip}-{cores * math.prod(map(int, shape.split('x')))}": f"{chip}:{shape}"
    for chip, (cores, shapes) in _SHAPES.items()
    for shape in shapes.split()
}
_TYPE = re.compile(r"(v\w+)-(\d+)")


@dataclass(frozen=True)
class Target:
    """A machine to plan for: ``cpu`` or chip and topology, its devices, and the memory of each."""

    name: str
    devices: int
    hbm_bytes: int


def find_target(name: str | None, engine: EngineConfig) -> Target:
    """Return the machine to plan for.

    Its name is ``cpu`` for this host, a chip and its topology, e.g. ``v5e:2x2x1``, or an
    accelerator type, e.g. ``v4-32``; None is ``cpu`` for ``engine.device=cpu`` and
    :data:`DEFAULT_TPU` for ``tpu``.

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
            f"has {counted(target.devices, 'device')}; the product must be {target.devices}"
        )
    return target


def _host(engine: EngineConfig) -> Target:
    """Return this host, or several like it; virtual devices share a host's memory equally."""
    devices = cpu_devices(engine)
    return Target(CPU, devices, host_memory_bytes() // (devices // engine.nnodes))


def _tpu(name: str) -> Target:
    name = _topology_of(name)
    chip, colon, topology = name.partition(":")
    if chip not in _HBM_BYTES:
        # "tpu" and "gpu" are like nothing but "cpu", which is not meant.
        hint = nearest(name, _EXAMPLES) if re.search(r"\d", name) else _VALID
        raise InputError(f"plan.target is {name!r}; {hint}")
    if not colon or not _TOPOLOGY.fullmatch(topology):
        raise InputError(
            f"plan.target is {name!r}; write the chip and its topology, e.g. {chip}:2x2x1"
        )
    sizes = [int(size) for size in topology.split("x")]
    if len(sizes) == 2:  # v5e and v6e are published with two dimensions; libtpu needs three
        sizes.append(1)
    canonical = f"{chip}:{'x'.join(map(str, sizes))}"
    return Target(canonical, math.prod(sizes), _HBM_BYTES[chip])


def _topology_of(name: str) -> str:
    """Return the chip and topology of an accelerator type; return any other name unchanged."""
    wanted = name.replace("v5litepod-", "v5e-")
    found = _TYPE.fullmatch(wanted)
    if found is None or found[1] not in _HBM_BYTES:
        return name
    if wanted not in _TYPES:
        types = [of_chip for of_chip in _TYPES if of_chip.startswith(f"{found[1]}-")]
        raise InputError(f"plan.target is {name!r}; valid are: {', '.join(types)}")
    return _TYPES[wanted]
