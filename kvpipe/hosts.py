"""The hosts of a slice, as the parent knows them: which of them this one is, and which has ended.

The same command is typed on each host. What they say to each other while the engine runs is in
:mod:`kvpipe.engine.lockstep`.
"""

import re
from collections.abc import Mapping, Sequence

from kvpipe.errors import InputError
from kvpipe.jax_environment import device_total
from kvpipe.schema import EngineConfig, Kvpipe

RANK_VARIABLES = ("KVPIPE_NODE_RANK", "TPU_WORKER_ID", "SLURM_PROCID")
"""Where a host finds its rank if ``engine.node_rank`` does not say it, the first that is set."""

_ADDRESS = re.compile(r"[A-Za-z0-9._-]+:(\d+)")
# The engine takes the port of the address, and for its broadcasts two of the six after it.
_LAST_PORT = 65535 - 6

# What jax's coordination service writes into the log of a process that it ends.
_ENDED_BY_SERVICE = "Terminating process because the JAX distributed service detected"
_TASK = re.compile(r"/job:jax_worker/replica:\d+/task:(\d+)")
_LEADER_GONE = "Failed to send RPC to coordination service"
_NOT_ALL_CAME = "RegisterTask"


def node_rank(config: Kvpipe, environ: Mapping[str, str]) -> int | None:
    """Return the rank that this host has among ``engine.nnodes``; None if there is one host.

    Args:
        config: the composed config.
        environ: the environment, which may say the rank (:data:`RANK_VARIABLES`).

    Raises:
        InputError: the hosts' keys contradict each other, or nothing says the rank.
    """
    check_hosts(config)
    engine = config.engine
    if engine.nnodes == 1 or engine.node_rank is not None:
        return engine.node_rank
    name = next((name for name in RANK_VARIABLES if environ.get(name)), None)
    if name is None:
        raise InputError(
            f"engine.node_rank: nothing says which of the {engine.nnodes} hosts this one is; set "
            f"{RANK_VARIABLES[0]} on each host, from 0 to {engine.nnodes - 1} "
            f"({' and '.join(RANK_VARIABLES[1:])} are read too)"
        )
    text = environ[name]
    if not text.isdecimal() or int(text) >= engine.nnodes:
        raise InputError(
            f"engine.node_rank: {name} is {text!r}, but engine.nnodes is {engine.nnodes}; it has "
            f"to be a number from 0 to {engine.nnodes - 1}"
        )
    return int(text)


def check_hosts(config: Kvpipe) -> None:
    """Refuse hosts that cannot be, as far as the config alone tells.

    Raises:
        InputError: with the key.
    """
    engine = config.engine
    if engine.node_rank is not None and engine.node_rank >= engine.nnodes:
        raise InputError(
            f"engine.node_rank is {engine.node_rank}, but engine.nnodes is {engine.nnodes}; it has "
            "to be less"
        )
    if engine.nnodes == 1:
        return
    _check_address(engine)
    devices = device_total(engine)
    if devices is not None and devices % engine.nnodes:
        raise InputError(
            f"engine.nnodes is {engine.nnodes}, but the mesh has {devices} devices; each host has "
            "to have as many"
        )
    if engine.tp_size is not None and engine.tp_size % engine.nnodes:
        raise InputError(
            f"engine.tp_size is {engine.tp_size}, but engine.nnodes is {engine.nnodes}; the engine "
            "takes a multiple of it"
        )
    if not config.runner.isolate:
        raise InputError(
            f"runner.isolate is false, but engine.nnodes is {engine.nnodes}: when a host fails, "
            "jax ends the process of every other; only a process of its own may be ended"
        )


def _check_address(engine: EngineConfig) -> None:
    address = engine.dist_init_addr
    if address is None:
        raise InputError(
            f"engine.dist_init_addr is not set, but engine.nnodes is {engine.nnodes}; it is the "
            "address of host 0 with a free port, e.g. 10.0.0.2:8476"
        )
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise InputError(
            f"engine.dist_init_addr is {address!r}; write HOST:PORT of host 0, e.g. 10.0.0.2:8476"
        )
    if not 0 < int(found[1]) <= _LAST_PORT:
        raise InputError(
            f"engine.dist_init_addr has port {found[1]}; it has to be 1 to {_LAST_PORT}, because "
            "the engine takes some of those after it"
        )


def who_ended(log: str, names: Sequence[str]) -> str | None:
    """Return which other host ended, as jax's coordination service says in the log; else None.

    Args:
        log: the end of the log of a worker that has ended.
        names: names of the hosts by rank; none before they met.
    """
    line = next((line for line in reversed(log.splitlines()) if _ENDED_BY_SERVICE in line), None)
    if line is None:
        return None
    told = log[log.rindex(line) :]
    if ranks := sorted({int(rank) for rank in _TASK.findall(told)}):
        return " and ".join(host_label(rank, names) for rank in ranks) + " ended"
    if _NOT_ALL_CAME in told:
        return "not every host came to engine.dist_init_addr"
    return f"{host_label(0, names)} ended" if _LEADER_GONE in told else None


def host_label(rank: int, names: Sequence[str]) -> str:
    """Return what messages call a host, e.g. ``host 1 (worker-1)``."""
    return f"host {rank} ({names[rank]})" if rank < len(names) else f"host {rank}"


def is_first(engine: EngineConfig) -> bool:
    """Whether this host is the one that writes the records, W&B and stdout."""
    return not engine.node_rank


def own_file(name: str, engine: EngineConfig) -> str:
    """Return what this host calls a file: hosts that share a file system share the directory.

    The first host has the plain name, another has its rank before the ending.
    """
    if is_first(engine):
        return name
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.host{engine.node_rank}{dot}{ending}"
