"""The entry of the worker's process: what has to be in force before jax is imported.

That import takes seconds, in which the parent may die, or call the start stuck.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvpipe.child import STACKS_FILE, remove_tree

if TYPE_CHECKING:
    from kvpipe.worker import Planner


def main(load: "Callable[[], Planner] | None" = None) -> None:
    """Entry of ``python -m kvpipe.worker_process FD``: do the job on stdin, report on FD.

    The job is one line with the plain config (``config``), when the run began (``run_began``) and
    the directory for temporary files (``scratch``). A line follows when the parent's own steps are
    done, one for each step that the parent knows to begin, and one for each record that it has
    written: before them nothing goes on. Standard input stays open for as long as the parent lives.
    SIGUSR1 writes the stacks of all threads into ``scratch``.

    Args:
        load: imports what the steps run beside and returns what plans them, if not the engine.
    """
    # Ctrl-C is the parent's to take; one that is sent to this process ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = json.loads(sys.stdin.readline())
    scratch = Path(job["scratch"])
    with (scratch / STACKS_FILE).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        orders = threading.Semaphore(0)
        threading.Thread(target=_listen, args=(orders, scratch), daemon=True).start()
        from kvpipe import worker

        exit_code = worker.work(
            job["config"],
            job["run_began"],
            int(sys.argv[1]),
            orders.acquire,
            load or worker.with_engine,
        )
    # The engine's threads are daemons deep in C++; Python's own way out can crash in them.
    os._exit(exit_code)


def _listen(orders: threading.Semaphore, scratch: Path) -> None:
    """Count the lines that the parent sends; once it is gone, end this process group.

    No temporary file stays behind.
    """
    for _ in sys.stdin:
        orders.release()
    remove_tree(scratch)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
