"""The hosts of a slice, as the parent sees them: the rank of this one, and which host ended.

The same command runs on each host. :mod:`kvpipe.engine.multihost` exchanges values between them
while the engine runs.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvpipe.config.jax_environment import device_total
from kvpipe.config.schema import EngineConfig, Kvpipe
from kvpipe.errors import InputError
from kvpipe.units import counted

RANK_VARIABLES = ("KVPIPE_NODE_RANK", "TPU_WORKER_ID", "SLURM_PROCID")
"""Environment variables that give a host's rank without ``engine.node_rank``; the first set wins."""

_ADDRESS = re.compile(r"[A-Za-z0-9._-]+:(\d+)")
# The engine uses the address's port, and for its broadcasts two of the six ports after it.
_LAST_PORT = 65535 - 6

# Log lines of jax's coordination service in a process that it ends.
_ENDED_BY_SERVICE = "Terminating process because the JAX distributed service detected"
_TASK = re.compile(r"/job:jax_worker/replica:\d+/task:(\d+)")
_LEADER_GONE = "Failed to send RPC to coordination service"
_NOT_ALL_CAME = "RegisterTask"


def with_node_rank(plain: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return a config of several hosts with this host's rank, if :data:`RANK_VARIABLES` give it.

    A rank in the config takes precedence.
    """
    engine = plain["engine"]
    name, nnodes = _rank_variable(environ), engine["nnodes"]
    if name is None or nnodes == 1 or engine["node_rank"] is not None:
        return dict(plain)
    if not environ[name].isdecimal() or int(environ[name]) >= nnodes:
        return dict(plain)
    return {**plain, "engine": engine | {"node_rank": int(environ[name])}}


def check_node_rank(engine: EngineConfig, environ: Mapping[str, str]) -> None:
    """Refuse a config of several hosts that :func:`with_node_rank` could not give a rank.

    Raises:
        InputError: the environment gives no rank, or none of these hosts.
    """
    if engine.nnodes == 1 or engine.node_rank is not None:
        return
    name = _rank_variable(environ)
    if name is None:
        raise InputError(
            f"engine.node_rank: nothing says which of the {engine.nnodes} hosts this one is; set "
            f"{RANK_VARIABLES[0]} on each host, from 0 to {engine.nnodes - 1} "
            f"({' and '.join(RANK_VARIABLES[1:])} are read too)"
        )
    raise InputError(
        f"engine.node_rank: {name} is {environ[name]!r}, but engine.nnodes is {engine.nnodes}; it "
        f"must be a number from 0 to {engine.nnodes - 1}"
    )


def _rank_variable(environ: Mapping[str, str]) -> str | None:
    return next((name for name in RANK_VARIABLES if environ.get(name)), None)


def check_hosts(config: Kvpipe) -> None:
    """Refuse inconsistent host options, as far as the config alone shows.

    Raises:
        InputError: with the key.
    """
    engine = config.engine
    if engine.node_rank is not None and engine.node_rank >= engine.nnodes:
        raise InputError(
            f"engine.node_rank is {engine.node_rank}, but engine.nnodes is {engine.nnodes}; it "
            "must be less"
        )
    if engine.nnodes == 1:
        return
    if every := config.trainer.checkpoint_every:
        raise InputError(
            f"trainer.checkpoint_every is {every}, but engine.nnodes is {engine.nnodes}: a trainer is "
            "saved on one host only"
        )
    _check_address(engine)
    devices = device_total(engine)
    if devices is not None and devices % engine.nnodes:
        raise InputError(
            f"engine.nnodes is {engine.nnodes}, but the mesh has {counted(devices, 'device')}; each host must "
            "have the same number"
        )
    if engine.tp_size is not None and engine.tp_size % engine.nnodes:
        raise InputError(
            f"engine.tp_size is {engine.tp_size}, but engine.nnodes is {engine.nnodes}; it must be "
            "a multiple of that"
        )
    if not config.runner.isolate:
        raise InputError(
            f"runner.isolate is false, but engine.nnodes is {engine.nnodes}: when a host fails, "
            "jax ends the processes of all others, so the engine needs a process of its own"
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
            f"engine.dist_init_addr has port {found[1]}; it must be 1 to {_LAST_PORT}, because "
            "the engine uses some of the ports after it"
        )


def who_ended(log: str, names: Sequence[str]) -> str | None:
    """Return which other host ended, according to jax's coordination service; None if unknown.

    ``log`` is the end of the log of a worker that has ended, ``names`` are the hosts' names by
    rank, none before the hosts have joined.
    """
    line = next((line for line in reversed(log.splitlines()) if _ENDED_BY_SERVICE in line), None)
    if line is None:
        return None
    message = log[log.rindex(line) :]
    if ranks := sorted({int(rank) for rank in _TASK.findall(message)}):
        return " and ".join(host_label(rank, names) for rank in ranks) + " ended"
    if _NOT_ALL_CAME in message:
        return "not every host came to engine.dist_init_addr"
    return f"{host_label(0, names)} ended" if _LEADER_GONE in message else None


def host_label(rank: int, names: Sequence[str]) -> str:
    """Return the name of a host for messages, e.g. ``host 1 (worker-1)``."""
    return f"host {rank} ({names[rank]})" if rank < len(names) else f"host {rank}"


def is_first(engine: EngineConfig) -> bool:
    """Whether this host writes the records, W&B and stdout."""
    return not engine.node_rank


def own_file(name: str, engine: EngineConfig) -> str:
    """Return this host's name for a file, since hosts may share the directory.

    Rank 0 uses the plain name; the others insert their rank before the suffix.
    """
    if is_first(engine):
        return name
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.host{engine.node_rank}{dot}{ending}"
