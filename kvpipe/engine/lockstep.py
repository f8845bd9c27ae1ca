"""The one place where the hosts of a slice talk to each other while the engine runs.

Every host runs the same steps, and launches the same programs in the same order. What they have to
agree on goes through the key-value store of jax's own distributed runtime, which runs no program on
the devices and so cannot come between those of the engine. A host that dies is noticed by that
runtime, which then ends the processes of all others.

With one host everything here is the identity, and nothing imports jax.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe.errors import DEFECT, KvpipeError, OutOfMemory, is_out_of_memory
from kvpipe.hosts import host_label
from kvpipe.schema import EngineConfig

# Somebody types the command on each host.
_JOIN_TIMEOUT_S = 300
# How long a host that has died goes unnoticed, at most. One that is alive answers from a thread of
# its own, whatever Python and the devices do.
_HEARTBEAT_TIMEOUT_S = 10
_LEAVE_TIMEOUT_S = 30
_LOOK_EVERY_S = 0.5
# The others may be held up by a program that waits for this host; it leaves, and jax ends them.
_FAILED_ALONE_S = 60.0
_END = "end"


class HostFailed(KvpipeError):
    """A host failed; on each host the message names it.

    Attributes:
        exit_code: that of the failure.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Hosts:
    """The hosts, and where this one is in what all of them do.

    Attributes:
        rank: which this one is.
        names: host names by rank.
        client: of the key-value store; None for one host.
        stage: how often all have come to the end of a stage.
        said: how many values this host has said in this stage.
        looked_at: when it last looked for a failure of another.
        others: the ranks of the others.
        left_alone: whether this host has failed and another did not come to the end of the stage.
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
    """Meet the other hosts, before jax is first asked for its devices; return the hosts' names.

    Args:
        config: how many there are, which this one is and where they meet.
        common: what has to be equal on all of them.

    Raises:
        HostFailed: something of it is not.
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
    told = gather({"name": socket.gethostname(), "common": dict(common)})
    _hosts.names = [host["name"] for host in told]
    for other in others:
        for key, value in common.items():
            if told[other]["common"][key] != json.loads(json.dumps(value)):
                first, second = sorted((rank, other))
                raise HostFailed(
                    f"{key} is not the same on {label(first)} and {label(second)}; type the same "
                    "command on each host",
                    2,
                )
    return _hosts.names


def leave() -> None:
    """Wait for the others at the end, so that none takes the end of this process for a failure."""
    if several() and not _hosts.left_alone:
        import jax

        jax.distributed.shutdown()


def rank() -> int:
    """Return which of the hosts this one is."""
    return _hosts.rank


def several() -> bool:
    """Whether there are several hosts."""
    return bool(_hosts.others)


def label(host: int) -> str:
    """Return what messages call a host."""
    return host_label(host, _hosts.names)


def positions_here() -> tuple[int, ...]:
    """Return where the devices of this host stand among those of all hosts."""
    import jax

    ids = [device.id for device in jax.devices()]
    return tuple(ids.index(device.id) for device in jax.local_devices())


def gather(value: Mapping[str, Any]) -> list[Any]:
    """End a stage: give what this host has of it, return what each host has, by rank.

    Args:
        value: JSON values. One with a true ``failed`` tells the others, who may still be waiting
            for this host within the stage, to wait no longer.
    """
    if not several():
        return [value]
    _put(_END, value)
    told = {other: _wait_for_end(other, value.get("failed")) for other in _hosts.others}
    told[rank()] = value
    # Nobody reads the stage before any more: all have come to the end of this one.
    _hosts.client.key_value_delete(f"kvpipe/{rank()}/{_hosts.stage - 1}/")
    _hosts.stage += 1
    _hosts.said = 0
    return [told[host] for host in sorted(told)]


def in_stage[T](action: Callable[[], T]) -> T:
    """Run ``action`` as a stage: what fails on one host is raised on all.

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
    """Return what the other hosts are told of a failure of this one.

    A failure that this host knows from another is none of its own.
    """
    if isinstance(error, HostFailed):
        return {"failed": {}}
    if is_out_of_memory(error):
        code = OutOfMemory.exit_code
    else:
        code = error.exit_code if isinstance(error, KvpipeError) else DEFECT
    told = str(error) if isinstance(error, KvpipeError) else f"{type(error).__name__}: {error}"
    return {"failed": {"error": told, "exit_code": code, "kind": type(error).__name__}}


def first_failure(told: Sequence[Mapping[str, Any]]) -> HostFailed | None:
    """Return the first failure among what the hosts have at the end of a stage."""
    for host, value in enumerate(told):
        if failed := value.get("failed"):
            return HostFailed(f"{label(host)}: {failed['error']}", failed["exit_code"])
    return None


def total(count: int) -> int:
    """Return the sum of a number over the hosts; each has to ask, at the same point.

    Raises:
        HostFailed: another host has failed instead.
    """
    if not several():
        return count
    tag = _say(count)
    return count + sum(_wait(other, tag) for other in _hosts.others)


def of_first(value: Any, check: Callable[[], None]) -> Any:
    """Return the JSON value of the first host; what the others give is not looked at.

    Args:
        value: the first host's.
        check: raises if this host has failed while it waits.

    Raises:
        HostFailed: the first host has failed instead.
    """
    if not several():
        return value
    if rank() == 0:
        _say(value)
        return value
    tag = str(_hosts.said)
    _hosts.said += 1
    return _wait(0, tag, check)


def raise_if_failed() -> None:
    """Raise if another host has told that it has failed in this stage; cheap enough to poll.

    Raises:
        HostFailed: one has.
    """
    if not several() or time.monotonic() - _hosts.looked_at < _LOOK_EVERY_S:
        return
    _hosts.looked_at = time.monotonic()
    for other in _hosts.others:
        _raise_if_ended(other)


def _raise_if_ended(other: int) -> None:
    """Raise if another host has ended the stage by a failure."""
    from jax.errors import JaxRuntimeError

    try:
        text = _hosts.client.key_value_try_get(_key(other, _END))
    except JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return
        raise
    failed = json.loads(text).get("failed")
    if failed is not None:
        error, code = failed.get("error", "another host failed"), failed.get("exit_code", 3)
        raise HostFailed(f"{label(other)}: {error}", code)


def _say(value: Any) -> str:
    """Give a value within the stage; return its tag."""
    tag = str(_hosts.said)
    _hosts.said += 1
    _put(tag, value)
    return tag


def _put(tag: str, value: Any) -> None:
    _hosts.client.key_value_set(_key(rank(), tag), json.dumps(value))


def _key(host: int, tag: str) -> str:
    return f"kvpipe/{host}/{_hosts.stage}/{tag}"


def _wait(other: int, tag: str, check: Callable[[], None] = lambda: None) -> Any:
    """Return what another host gives within the stage, unless it ends it by a failure."""
    while True:
        check()
        if (found := _look(_key(other, tag))) is not None:
            return found
        _raise_if_ended(other)


def _wait_for_end(other: int, failed: Mapping[str, Any] | None) -> Any:
    """Return what another host has at the end of the stage.

    Args:
        other: its rank.
        failed: the failure of this host, which does not wait long then.

    Raises:
        HostFailed: it did not come in time.
    """
    deadline = time.monotonic() + _FAILED_ALONE_S
    while (found := _look(_key(other, _END))) is None:
        if failed and time.monotonic() > deadline:
            _hosts.left_alone = True
            raise HostFailed(
                f"{label(rank())}: {failed['error']}; then {label(other)} was held up for more "
                f"than {_FAILED_ALONE_S:g} s",
                failed["exit_code"],
            )
    return found


def _look(key: str) -> Any:
    """Return the value of a key once it is there; None if it is not within a moment."""
    from jax.errors import JaxRuntimeError

    try:
        return json.loads(_hosts.client.blocking_key_value_get(key, int(_LOOK_EVERY_S * 1000)))
    except JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
