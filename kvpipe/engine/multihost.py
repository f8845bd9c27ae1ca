"""Exchange values between the hosts of a slice while the engine runs; no other module does.

Every host runs the same steps and launches the same programs in the same order. The hosts exchange
values through the key-value store of jax's distributed runtime, which runs no program on the
devices, so it cannot interleave with the engine's collectives. That runtime detects a dead host
and ends the processes of all others.

On a single host every function here is the identity, and nothing imports jax.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpipe.config.hosts import host_label
from kvpipe.config.schema import EngineConfig
from kvpipe.errors import BAD_INPUT, FAILED, KvpipeError, ending_of

# Long enough to type the command on each host by hand.
_JOIN_TIMEOUT_S = 300
# Upper bound on how long a dead host goes undetected. A live one answers from a separate thread,
# whatever Python and the devices are doing.
_HEARTBEAT_TIMEOUT_S = 10
_LEAVE_TIMEOUT_S = 30
_LOOK_EVERY_S = 0.5
# The other hosts may be blocked in a program that waits for this host. After this time this host
# exits, and jax ends the others.
_FAILED_ALONE_S = 60.0
_END = "end"


class HostFailed(KvpipeError):
    """A host failed; the message, the same on each host, names it, and the exit code is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Hosts:
    """The hosts, and the progress of this one through the common stages.

    Attributes:
        rank: rank of this host.
        names: host names by rank.
        client: client of the key-value store; None on a single host.
        stage: number of stages that all hosts have completed.
        said: number of values that the hosts have exchanged in this stage.
        looked_at: monotonic time of the last check for a failure of another host.
        others: ranks of the other hosts.
        left_alone: whether this host failed and another one did not complete the stage.
    """

    rank: int = 0
    names: Sequence[str] = ("",)
    client: Any = None
    stage: int = 0
    said: int = 0
    looked_at: float = 0.0
    others: Sequence[int] = ()
    left_alone: bool = False


_hosts = _Hosts()


def join(config: EngineConfig, common: Mapping[str, Any]) -> Sequence[str]:
    """Join the other hosts, before jax first queries its devices; return the host names by rank.

    ``common`` are values, by config key, that must be equal on all hosts.

    Raises:
        HostFailed: one of the common values differs.
    """
    global _hosts
    if config.nnodes == 1:
        return ()
    assert config.node_rank is not None
    import jax
    from jax._src import distributed

    jax.distributed.initialize(
        config.dist_init_addr,
        config.nnodes,
        config.node_rank,
        cluster_detection_method="deactivate",
        initialization_timeout=_JOIN_TIMEOUT_S,
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=_LEAVE_TIMEOUT_S,
    )
    rank, ranks = config.node_rank, range(config.nnodes)
    others = [other for other in ranks if other != rank]
    _hosts = _Hosts(rank, (), distributed.global_state.client, others=others)
    received = gather({"name": socket.gethostname(), "common": dict(common)})
    _hosts.names = [host["name"] for host in received]
    for other in others:
        for key, value in common.items():
            if received[other]["common"][key] != json.loads(json.dumps(value)):
                first, second = sorted((rank, other))
                raise HostFailed(
                    f"{key} is not the same on {label(first)} and {label(second)}; type the same "
                    "command on each host",
                    BAD_INPUT,
                )
    return _hosts.names


def leave() -> None:
    """Wait for the other hosts at exit, so that none mistakes this exit for a failure."""
    if several() and not _hosts.left_alone:
        import jax

        jax.distributed.shutdown()


def rank() -> int:
    """Return the rank of this host."""
    return _hosts.rank


def several() -> bool:
    """Whether there is more than one host."""
    return bool(_hosts.others)


def label(host: int) -> str:
    """Return the name of a host for messages."""
    return host_label(host, _hosts.names)


def positions_here() -> tuple[int, ...]:
    """Return the positions of this host's devices in the list of all devices."""
    import jax

    ids = [device.id for device in jax.devices()]
    return tuple(ids.index(device.id) for device in jax.local_devices())


def gather(value: Mapping[str, Any]) -> list[Any]:
    """End a stage: publish this host's result, a JSON object, and return every host's by rank.

    If ``failed`` in it is true, hosts that still wait for this one within the stage stop waiting.
    """
    if not several():
        return [value]
    _put(_END, value)
    received = {other: _wait_for_end(other, value.get("failed")) for other in _hosts.others}
    received[rank()] = value
    # All hosts have completed this stage, so none reads the previous one any more.
    _hosts.client.key_value_delete(f"kvpipe/{rank()}/{_hosts.stage - 1}/")
    _hosts.stage += 1
    _hosts.said = 0
    return [received[host] for host in sorted(received)]


def in_stage[T](action: Callable[[], T]) -> T:
    """Run ``action`` as a stage: a failure on one host is raised on all.

    Raises:
        HostFailed: it failed on a host.
    """
    if not several():
        return action()
    try:
        done = action()
    except Exception as error:
        if (first := first_failure(gather(failure(error)))) is not None:
            raise first from error
        raise
    if (first := first_failure(gather({}))) is not None:
        raise first
    return done


def failure(error: Exception) -> dict[str, Any]:
    """Return this host's failure as the stage result that the other hosts receive.

    A failure that came from another host is reported empty, because that host reports it.
    """
    if isinstance(error, HostFailed):
        return {"failed": {}}
    return {"failed": asdict(ending_of(error))}


def first_failure(received: Sequence[Mapping[str, Any]]) -> HostFailed | None:
    """Return the first failure, by rank, in the hosts' results of a stage."""
    for host, value in enumerate(received):
        if failed := value.get("failed"):
            return HostFailed(f"{label(host)}: {failed['error']}", failed["exit_code"])
    return None


def total(count: int) -> int:
    """Return the sum of a number over the hosts; every host must call it at the same point.

    Raises:
        HostFailed: another host failed before it published its number.
    """
    return sum(each(count))


def each(value: Any) -> list[Any]:
    """Return every host's JSON value, this one's first; every host must call it at the same point.

    Raises:
        HostFailed: another host failed before it published its value.
    """
    if not several():
        return [value]
    tag = _next_tag()
    _put(tag, value)
    return [value, *(_wait(other, tag) for other in _hosts.others)]


def of_first(value: Any, check: Callable[[], None]) -> Any:
    """Broadcast the JSON value of rank 0; the values of the other hosts are ignored.

    ``check`` is called while this host waits; it raises if this host has failed.

    Raises:
        HostFailed: rank 0 failed before it published the value.
    """
    if not several():
        return value
    tag = _next_tag()
    if rank() == 0:
        _put(tag, value)
        return value
    return _wait(0, tag, check)


def raise_if_failed() -> None:
    """Raise if another host has published a failure in this stage; cheap enough to poll.

    Raises:
        HostFailed: another host failed.
    """
    if not several() or time.monotonic() - _hosts.looked_at < _LOOK_EVERY_S:
        return
    _hosts.looked_at = time.monotonic()
    for other in _hosts.others:
        _raise_if_ended(other)


def _raise_if_ended(other: int) -> None:
    """Raise if another host has ended the stage with a failure."""
    from jax.errors import JaxRuntimeError

    try:
        text = _hosts.client.key_value_try_get(_key(other, _END))
    except JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return
        raise
    failed = json.loads(text).get("failed")
    if failed is not None:
        error = failed.get("error", "another host failed")
        raise HostFailed(f"{label(other)}: {error}", failed.get("exit_code", FAILED))


def _next_tag() -> str:
    """Return the tag of the next value that the hosts exchange within the stage."""
    tag = str(_hosts.said)
    _hosts.said += 1
    return tag


def _put(tag: str, value: Any) -> None:
    _hosts.client.key_value_set(_key(rank(), tag), json.dumps(value))


def _key(host: int, tag: str) -> str:
    return f"kvpipe/{host}/{_hosts.stage}/{tag}"


def _wait(other: int, tag: str, check: Callable[[], None] = lambda: None) -> Any:
    """Wait for another host's value; raise if that host ends the stage with a failure."""
    while True:
        check()
        if (found := _look(_key(other, tag))) is not None:
            return found
        _raise_if_ended(other)


def _wait_for_end(other: int, failed: Mapping[str, Any] | None) -> Any:
    """Wait for another host's result at the end of the stage.

    A failure of this host limits the wait.
    """
    deadline = time.monotonic() + _FAILED_ALONE_S
    while (found := _look(_key(other, _END))) is None:
        if failed and time.monotonic() > deadline:
            _hosts.left_alone = True
            raise HostFailed(
                f"{label(rank())}: {failed['error']}; then {label(other)} did not complete the "
                f"stage within {_FAILED_ALONE_S:g} s",
                failed["exit_code"],
            )
    return found


def _look(key: str) -> Any:
    """Return the value of a key, or None if it is not there within ``_LOOK_EVERY_S``."""
    from jax.errors import JaxRuntimeError

    try:
        return json.loads(_hosts.client.blocking_key_value_get(key, int(_LOOK_EVERY_S * 1000)))
    except JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
