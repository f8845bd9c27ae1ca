import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpipe.engine import multihost
from kvpipe.engine.failure import FailureWatch
from kvpipe.engine.requests import Requests
from kvpipe.engine.scheduler_thread import SchedulerThread

pytestmark = pytest.mark.slow


class Socket:
    """A socket, and whether somebody waits in it."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.poll = socket.poll
        self.entered = threading.Event()

    def recv(self) -> bytes:
        self.entered.set()
        return self._socket.recv()


def test_a_host_runs_what_is_queued_though_it_waited_for_a_broadcast_before_it_was_taken_over(
    four_devices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host, whose callables wait for this host's, broadcasts nothing until they have run."""
    import zmq

    from kvpipe.engine import compat

    compat.import_engine()
    from sgl_jax.srt.managers.scheduler import Scheduler

    monkeypatch.setattr(multihost, "_hosts", multihost._Hosts(rank=1))
    with zmq.Context() as context, context.socket(zmq.PUB) as first, context.socket(zmq.SUB) as own:
        first.bind(f"ipc://{tmp_path}/rounds")
        own.connect(f"ipc://{tmp_path}/rounds")
        own.setsockopt(zmq.SUBSCRIBE, b"")
        own.setsockopt(zmq.RCVTIMEO, 100)
        scheduler: Any = Scheduler.__new__(Scheduler)
        scheduler.node_rank = 1
        scheduler.subscriber = socket = Socket(own)
        scheduler.waiting_queue, scheduler.last_batch, scheduler.cur_batch = [], None, None
        scheduler.running_batch = SimpleNamespace(is_empty=lambda: True)
        rounds: list[Any] = []
        thread = threading.Thread(target=lambda: rounds.append(scheduler.run_subscriber()))
        thread.start()
        assert socket.entered.wait(60)
        failure = FailureWatch()
        try:
            taken_over = SchedulerThread(scheduler, Requests(None, failure), failure, 20)
            assert taken_over.call(threading.get_ident) == thread.ident
            assert rounds == []
        finally:
            while thread.is_alive():  # a broadcast before the socket has connected is lost
                first.send(pickle.dumps(["a request"]))
                thread.join(0.1)
        assert rounds == [["a request"]]
