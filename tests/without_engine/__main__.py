"""``python -m tests.without_engine``: the command ``kvpipe``, but no run of it starts an engine.

Everything is the real thing except for the module that runs as the worker.
"""

from kvpipe import supervisor
from kvpipe.__main__ import main

if __name__ == "__main__":
    supervisor.Run.worker_module = "tests.without_engine.worker"
    main()
