"""Entry point of the worker process: install its safeguards before jax is imported.

That import takes seconds, during which the parent may die or its start limit may expire.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kvpipe.system.pipes import STACKS_FILE, remove_tree
from kvpipe.worker.orders import Orders

if TYPE_CHECKING:
    from kvpipe.worker.work import Load


def main(load: "Load | None" = None) -> None:
    """Entry point of ``python -m kvpipe.worker.entry FD``: do the job on stdin, report on FD.

    The job is one line with the plain config (``config``), the start of the run (``run_began``,
    monotonic: the clock of the system is one for all its processes, and nobody can set it) and the
    directory for temporary files (``scratch``). Then come the parent's orders
    (:mod:`kvpipe.worker.orders`): ``begin`` once its own steps are done, and for each step that the
    worker begins, once all records before it are written; ``stop`` if no further step may begin.
    Standard input stays open for as long as the parent lives.
    SIGUSR1 writes the stacks of all threads into ``scratch``.

    ``load`` imports the engine or its replacement and returns the planner; None is the engine.
    """
    # The parent handles the terminal's Ctrl-C; a SIGINT sent to this process ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = json.loads(sys.stdin.readline())
    scratch = Path(job["scratch"])
    with (scratch / STACKS_FILE).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        orders = Orders()
        threading.Thread(target=_listen, args=(orders, scratch), daemon=True).start()
        from kvpipe.worker import work

        exit_code = work.work(
            job["config"],
            job["run_began"],
            int(sys.argv[1]),
            orders,
            load or work.with_engine,
        )
    # The engine's daemon threads are deep in C++, where Python's normal exit can crash.
    os._exit(exit_code)


def _listen(orders: Orders, scratch: Path) -> None:
    """Take the parent's orders; once the parent is gone, end this process group.

    Remove the temporary files first.
    """
    for line in sys.stdin:
        orders.take(line)
    remove_tree(scratch)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
